"""X becomes A: rows in canonical order, patches of images, whitening."""
