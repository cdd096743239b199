"""Other programs that the studies compare with."""
