import doctest
import gzip
import io
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from convexbn.files import datasets
from convexbn.files.datasets import cifar10, digits, fashion_mnist

FILES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}


def idx(shape, data):
    header = bytes([0, 0, 8, len(shape)]) + b"".join(side.to_bytes(4, "big") for side in shape)
    return header + data


def good(name):
    """Bytes of a file of the right form whose k-th byte of data is k mod 10."""
    shape = FILES[name]
    return idx(shape, (np.arange(np.prod(shape)) % 10).astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Return a folder with the four files, the images plain and the labels compressed."""
    folder = tmp_path_factory.mktemp("fashion")
    for name in FILES:
        if "labels" in name:
            (folder / f"{name}.gz").write_bytes(gzip.compress(good(name), 1))
        else:
            (folder / name).write_bytes(good(name))
    return folder


@pytest.fixture
def folder(complete, tmp_path):
    """Return a folder of links to the four files, to be spoilt by a test."""
    for path in complete.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def spoil(folder, name, data):
    """Put a file of these bytes in place of a good one; return the pattern its error must begin with."""
    for path in folder.glob(f"{name.removesuffix('.gz')}*"):
        path.unlink()
    (folder / name).write_bytes(data)
    return f"^{re.escape(str(folder / name))}: "


def test_docstrings():
    assert doctest.testmod(datasets).failed == 0


def test_digits_are_scikit_learns_in_float64():
    data = digits()
    assert data.name == "digits"
    assert data.X.shape == (1797, 64) and data.X.dtype == np.float64
    assert data.y.dtype == np.int64 and np.array_equal(np.unique(data.y), np.arange(10))
    assert data.X.min() == 0 and data.X.max() == 16
    assert data.X_test is None and data.y_test is None


def test_four_files_plain_or_compressed(complete):
    data = fashion_mnist(complete)
    assert data.name == "fashion-mnist"
    assert data.X.shape == (60_000, 784) and data.X_test.shape == (10_000, 784)
    assert data.X.dtype == data.X_test.dtype == np.uint8
    assert data.y.dtype == data.y_test.dtype == np.int64
    assert np.array_equal(data.X.ravel()[:25], np.arange(25) % 10)
    assert np.array_equal(data.y_test, np.arange(10_000) % 10)
    data.X[0, 0] = 7  # the caller's own copy


@pytest.mark.skipif(
    not all((datasets._DEBIAN_HOME / f"{name}.gz").is_file() for name in FILES),
    reason="the Debian package dataset-fashion-mnist is not installed",
)
def test_the_published_files():
    data = fashion_mnist()
    assert np.array_equal(np.bincount(data.y), [6_000] * 10)
    assert np.array_equal(np.bincount(data.y_test), [1_000] * 10)
    assert data.y[:5].tolist() == [9, 0, 0, 3, 0]
    assert data.X.mean() / 255 == pytest.approx(0.2860, abs=5e-5)  # the constants everybody normalises with
    assert data.X.std() / 255 == pytest.approx(0.3530, abs=5e-5)


def test_a_missing_file_says_what_to_install(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte.*dataset-fashion-mnist.*--data-home"):
        fashion_mnist(folder)


def test_all_files_are_looked_for_before_one_is_read(folder):
    spoil(folder, "train-images-idx3-ubyte", b"")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError):
        fashion_mnist(folder)


@pytest.mark.parametrize(("name", "compress"), [*((name, False) for name in FILES), ("t10k-labels-idx1-ubyte", True)])
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda data: b"", "must begin with"),
        (lambda data: b"\x00\x00\x0d" + data[3:], "unsigned bytes"),  # floats
        (lambda data: data[:3] + b"\x02" + data[4:], "must begin with"),
        (lambda data: b"\x00\x00\x08", "must begin with"),
        (lambda data: data[:4] + b"\x7f\xff\xff\xff" + data[8:], "announce the shape"),
        (lambda data: data[:6], "announce the shape"),
        (lambda data: data[:-1], "there are fewer"),
        (lambda data: data + b"\x00", "there are more"),
    ],
)
def test_header_and_length_are_exact(folder, name, compress, change, rule):
    data = change(good(name))
    place = spoil(folder, f"{name}.gz", gzip.compress(data, 1)) if compress else spoil(folder, name, data)
    with pytest.raises(ValueError, match=f"{place}.*{rule}"):
        fashion_mnist(folder)


def test_a_label_beyond_nine(folder):
    data = bytearray(good("train-labels-idx1-ubyte"))
    data[-1] = 200
    place = spoil(folder, "train-labels-idx1-ubyte", data)
    with pytest.raises(ValueError, match=f"{place}.*0 to 9"):
        fashion_mnist(folder)


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-9],  # no end
        lambda data: flip(data, len(data) // 2),  # the checksum differs
        lambda data: flip(data, -8),
        lambda data: data[:10] + b"\x07" + data[11:],  # no kind of block that deflate knows
        lambda data: b"<html>" + data,
    ],
)
def test_a_damaged_gzip_file(folder, change):
    name = "t10k-labels-idx1-ubyte"
    rng = np.random.default_rng(0)
    data = gzip.compress(idx(FILES[name], rng.integers(0, 10, 10_000, dtype=np.uint8).tobytes()), 1)
    place = spoil(folder, f"{name}.gz", change(data))
    with pytest.raises(ValueError, match=f"{place}must"):
        fashion_mnist(folder)


def test_a_gzip_bomb_is_not_unpacked(folder, monkeypatch):
    name = "train-labels-idx1-ubyte"
    bomb = gzip.compress(idx(FILES[name], bytes(20_000_000)), 1)
    place = spoil(folder, f"{name}.gz", bomb)
    unpacked = []
    read = gzip.GzipFile.read

    def counting(self, size=-1):
        data = read(self, size)
        unpacked.append(len(data))
        return data

    monkeypatch.setattr(gzip.GzipFile, "read", counting)
    with pytest.raises(ValueError, match=f"{place}.*more"):
        datasets._read_idx(folder / f"{name}.gz", FILES[name])
    assert sum(unpacked) == 8 + 60_000 + 1


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("compress", [False, True])
def test_no_pickle_is_executed(folder, tmp_path, compress):
    canary = tmp_path / "canary"
    data = pickle.dumps(Canary(canary))
    for name in FILES:
        spoil(folder, f"{name}.gz" if compress else name, gzip.compress(data) if compress else data)
    with pytest.raises(ValueError, match="must begin with"):
        fashion_mnist(folder)
    assert not canary.exists()
    pickle.loads(data)  # the canary does sing
    assert canary.exists()


# --- CIFAR-10 ---


def encoded(pixels, form="PNG"):
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def parquet(path, images, labels, column="img"):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": image, "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({column: pa.array(rows, kind), "label": pa.array(labels, pa.int64())}), path)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with 30 and 10 images, which is what CIFAR-10 has for once, and the pixels of the first part."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("PIL")
    monkeypatch.setattr(datasets, "_CIFAR_ROWS", (30, 10))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    parquet(tmp_path / "train.parquet", [encoded(image) for image in pixels], np.arange(30) % 10)
    parquet(tmp_path / "test.parquet", [encoded(image, "JPEG") for image in pixels[:10]], np.arange(10))
    return tmp_path, pixels


def test_cifar_images_are_decoded_row_by_row(small, monkeypatch):
    folder, pixels = small
    data = cifar10(folder)
    assert data.name == "cifar-10" and data.X.dtype == data.X_test.dtype == np.uint8
    assert np.array_equal(data.X, pixels.reshape(30, 3072)) and data.X_test.shape == (10, 3072)
    assert data.y.dtype == np.int64 and np.array_equal(data.y, np.arange(30) % 10)
    monkeypatch.setenv("CIFAR10_HOME", str(folder))
    assert np.array_equal(cifar10().X_test, data.X_test)


def test_cifar_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.delenv("CIFAR10_HOME", raising=False)
    with pytest.raises(FileNotFoundError, match=r"^CIFAR-10: no folder is given; .*--data-home"):
        cifar10()
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "train.parquet"))):
        cifar10(tmp_path)


NOISE = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)


def grey(size):
    return encoded(np.zeros(size, dtype=np.uint8))


@pytest.mark.parametrize(
    ("images", "labels", "column", "rule"),
    [
        (10 * [grey((32, 32))], np.arange(9), "img", "must hold 10 images, and it holds 9"),
        (9 * [grey((32, 32))] + [grey((33, 32))], np.arange(10), "img", "32 x 32 pixels, and one has 32 x 33"),
        (9 * [grey((32, 32))] + [b"GIF89a"], np.arange(10), "img", "sound PNG or JPEG"),
        (9 * [grey((32, 32))] + [pickle.dumps("canary")], np.arange(10), "img", "sound PNG or JPEG"),
        (9 * [grey((32, 32))] + [encoded(NOISE)[:500]], np.arange(10), "img", "sound PNG or JPEG"),
        (10 * [grey((32, 32))], np.arange(1, 11), "img", "labels must be 0 to 9"),
        (10 * [grey((32, 32))], np.arange(10), "picture", "img"),
        (9 * [grey((32, 32))] + [None], np.arange(10), "img", ""),
    ],
)
def test_cifar_files_that_are_not_what_they_should_be(small, images, labels, column, rule):
    folder, _ = small
    parquet(folder / "test.parquet", images[: len(labels)], labels, column)
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder / 'test.parquet'))}: .*{rule}"):
        cifar10(folder)


def test_a_cifar_file_that_is_no_parquet(small):
    folder, _ = small
    (folder / "test.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder / 'test.parquet'))}: "):
        cifar10(folder)


@pytest.mark.skipif("CIFAR10_HOME" not in os.environ, reason="CIFAR-10 is not here")
def test_the_real_cifar():
    data = cifar10()
    assert data.X.shape == (50_000, 3072) and data.X_test.shape == (10_000, 3072)
    assert np.all(np.bincount(data.y) == 5000) and np.all(np.bincount(data.y_test) == 1000)
