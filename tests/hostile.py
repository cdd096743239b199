"""A corpus of damaged and hostile files, each filed under the kind of refusal that it must meet.

``python tests/hostile.py FOLDER`` writes it as ``FOLDER/<kind>/<name>``. The same bytes come out every time.
Nothing of convexbn is used: `forge` follows the docstring of ``convexbn.files.model_file``, and so checks that too.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import pickle
import random
import re
import struct
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

KINDS = {
    "any": "",
    "compressed": "looks like a compressed file",
    "cover": "safetensors does not read it",
    "cut": "ends after|safetensors does not read it",
    "digest": "checksum",
    "dtype": "has dtype",
    "empty": "looks like an empty file",
    "entry": "not exactly a dtype, a shape and data_offsets",
    "foreign": "without a convexbn model",
    "hdf5": "looks like an HDF5",
    "html": "looks like an HTML",
    "image": "looks like an image",
    "json": "not strict JSON|not a JSON object|safetensors does not read it",
    "jsontext": "looks like a JSON text",
    "length": "ends after|first bytes|not strict JSON|safetensors does not read it",
    "metadata": "__metadata__ is not",
    "nesting": "levels or",
    "offsets": "safetensors does not read it",
    "pickle": "looks like a pickle",
    "shape": "impossible shape|safetensors does not read it",
    "tensors": "tensors are more than",
    "text": "looks like a text",
    "torch": "zip archive around a pickle",
    "unknown": "first bytes",
    "values": "NaN or infinity|neither 0 nor 1",
    "version": "upgrade convexbn",
    "zip": "looks like a zip",
}
"""What the message of each kind of refusal says, as a regular expression."""

CANARY = "convexbn-canary"
"""The file that appears in the current folder if a pickle of the corpus is ever executed."""

HEADER = {"gap": 1e-17, "name": 'Ångström \\ "quoted"', "path": [{"weight_decay": 0.1}, None, True, -3]}
TENSORS = {
    "weight": ("F64", [2, 3], struct.pack("<6d", 0.1, -0.0, 5e-324, 1.7e308, 2.0, -1.0)),
    "none": ("F64", [0, 3], b""),
    "labels": ("I64", [3], struct.pack("<3q", -(2**63), 0, 2**63 - 1)),
    "scale": ("F32", [], struct.pack("<f", 0.5)),
    "counts": ("I32", [2, 1], struct.pack("<2i", -7, 7)),
    "bytes": ("U8", [5], bytes([0, 1, 2, 254, 255])),
    "kept": ("BOOL", [3], bytes([1, 0, 1])),
}


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def seal(text: str, tensors: dict, **changes: object) -> dict:
    """Return the ``__metadata__`` of a file of the version, with parts replaced, or removed if None."""
    names = sorted(tensors)
    preamble = compact([version, text, [[name, *tensors[name][:2]] for name in names]]).encode()
    message = struct.pack("<Q", len(preamble)) + preamble + b"".join(tensors[name][2] for name in names)
    header = "convexbn" if version == "1" else "header"
    parts = {"format": version, header: text, "sha256": hashlib.sha256(message).hexdigest(), **changes}
    kept = {key: value for key, value in parts.items() if value is not None}
    return kept if version == "1" else {"convexbn": json.dumps(kept, separators=(",", ":"))}


def layout(tensors: dict) -> tuple[dict, bytes]:
    """Return the lines of the table and the data, widest types first."""
    width = {"I64": 5, "F64": 4, "F32": 3, "I32": 2, "U8": 1}
    table, data = {}, b""
    for name in sorted(tensors, key=lambda name: (-width.get(tensors[name][0], 0), name)):
        dtype, shape, chunk = tensors[name]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(chunk)]}
        data += chunk
    return table, data


def frame(table: bytes, data: bytes = b"") -> bytes:
    table += b" " * (-len(table) % 8)
    return struct.pack("<Q", len(table)) + table + data


def forge(text: str = compact(HEADER), tensors: dict = TENSORS, **metadata: object) -> bytes:
    """Return a sound file, with strings of its metadata replaced, or removed if None."""
    table, data = layout(tensors)
    table = {"__metadata__": seal(text, tensors, **metadata), **table}
    return frame(json.dumps(table, separators=(",", ":")).encode(), data)


def bend(name: str, **changes: object) -> bytes:
    """Return the sound file with parts of a tensor's line in the table replaced, or removed if None."""
    table, data = layout(TENSORS)
    line = {**table[name], **changes}
    table[name] = {key: value for key, value in line.items() if value is not None}
    table = {"__metadata__": seal(compact(HEADER), TENSORS), **table}
    return frame(compact(table).encode(), data)


def swap(old: bytes, new: bytes) -> bytes:
    """Return the sound file with a piece of its table replaced by another."""
    size = struct.unpack("<Q", SOUND[:8])[0]
    table = SOUND[8 : 8 + size].rstrip()
    assert table.count(old) == 1, (old, table)
    return frame(table.replace(old, new), SOUND[8 + size :])


version = "2"
"""The format of what is forged; `of_version` changes it."""

SOUND = forge()


def of_version(number: str) -> None:
    """Let everything that follows be files of a format."""
    global version, SOUND
    version = number
    SOUND = forge()


Case = tuple[str, str, bytes]


def number(kind: str, contents: Iterable[bytes]) -> Iterator[Case]:
    for count, content in enumerate(contents):
        yield kind, f"{kind}-{count:02}", content


def damaged() -> Iterator[Case]:
    """Yield files that were cut, lengthened or changed in one bit, or that lie about their table's length."""
    yield "empty", "empty", b""
    chance = random.Random(0)
    yield from number("cut", (SOUND[:size] for size in chance.sample(range(9, len(SOUND)), 20)))
    for place in chance.sample(range(8 * len(SOUND)), 20):
        flipped = bytearray(SOUND)
        flipped[place // 8] ^= 1 << place % 8
        yield "any", f"bit-{place:05}", bytes(flipped)
    sizes = [0, 1, 8, len(SOUND) - 7, 99_999_999, 100_000_000, 2**31, 2**32 + 8, 2**63, 2**64 - 1]
    yield from number("length", (struct.pack("<Q", size) + SOUND[8:] for size in sizes))
    yield "cover", "byte-more", SOUND + b"\0"
    yield "cover", "twice", SOUND + SOUND


def bad_json() -> Iterator[Case]:
    """Yield files whose table or header is not the JSON that it should be."""
    broken = [
        *["{", '{"a', '{"a":1', '{"a":1,}', '{"a":"\\', '{"a":"\\u00g0"}', '{"a":"\n"}', "{a:1}", "{'a':1}"],
        *["{}{}", "{}//", "{}\0", '{"a":NaN}', '{"a":-Infinity}', '{"a":1e999}', '{"a":1' + "0" * 5000 + "}"],
        *['{"a":1,"a":1}', '{"a":1,"\\u0061":1}', '{"b":[{"a":1,"a":2}]}', '{"a":01}', '{"a":"\ud800"}'],
    ]
    other = ["[]", '"a"', "1", "null", " ", "\ufeff{}", "\ud800"]
    yield from number("json", (frame(text.encode(errors="surrogatepass")) for text in broken))
    yield from number("json-header", (forge(text) for text in broken + other))
    yield "json", "latin", swap(b'"weight"', b'"wei\xe9ht"')
    yield "json", "tensor-twice", swap(b'"none"', b'"weight"')
    yield "json", "dtype-twice", swap(b'{"dtype":"F32"', b'{"dtype":"F32","dtype":"F32"')
    yield "json", "format-twice", swap(quoted('"format":"%s"'), quoted('"format":"%s","format":"%s"'))
    for depth in [33, 200, 20_000]:
        yield "nesting", f"arrays-{depth}", forge('{"a":' + "[" * depth + "]" * depth + "}")
        yield "nesting", f"objects-{depth}", forge('{"a":' * depth + "1" + "}" * depth)
        yield "nesting", f"table-{depth}", frame(b'{"a":' * depth)


def bad_tables() -> Iterator[Case]:
    """Yield files whose tensors are described wrongly."""
    yield "tensors", "1001", forge(tensors={f"t{i}": ("U8", [0], b"") for i in range(1001)})
    many = b",".join(b'"t%d":0' % i for i in range(4000))
    yield "tensors", "4000", swap(b'"none"', many + b',"none"')
    lines = [b"null", b"[]", b'"F64"', b"1", b"{}", b'{"dtype":"F64","shape":[0],"offsets":[0,0]}']
    yield from number("entry", (swap(b'"none"', b'"a":' + line + b',"none"') for line in lines))
    keys = ["dtype", "shape", "data_offsets"]
    yield from number("entry-less", (bend("weight", **{key: None}) for key in keys))
    yield "entry", "more", bend("weight", device="cpu")
    dtypes = ["F16", "BF16", "F8_E4M3", "I8", "U16", "U64", "C64", "f64", "F64 ", "", 8, ["F64"], {}, True]
    yield from number("dtype", (bend("weight", dtype=dtype) for dtype in dtypes))
    shapes = [[-2, -3], [2.0, 3], ["2", 3], [True, 6], [None], [[2, 3]], 6, {}, "23", [1] * 33, [1] * 5000]
    sizes = [[2**32, 2**32], [2**63 + 3, 2], [10**400], [10**4000] * 9, [0, 2**32, 2**32], [0, 2**63]]
    yield from number("shape", (bend("weight", shape=shape) for shape in shapes + sizes))
    spans = [[24.0, 72.0], [False, True], ["24", "72"], [24], [24, 72, 72], {"0": 24}, "24"]
    places = [[-48, 0], [72, 24], [24, 71], [24, 73], [24, 2**64 + 72], [2**64 - 24, 24]]
    yield from number("offsets", (bend("weight", data_offsets=span) for span in spans + places))
    yield from number("offsets-shape", (bend("weight", shape=shape) for shape in [[2, 2], [2, 10**9], []]))
    yield "offsets", "from-nothing", bend("none", shape=[1, 3])
    begins = [0, 17, 32, 2**40]
    yield from number("cover", (bend("weight", data_offsets=[begin, begin + 48]) for begin in begins))
    yield "cover", "orphan", swap(b',"kept":{"dtype":"BOOL","shape":[3],"data_offsets":[89,92]}', b"")


def bad_metadata() -> Iterator[Case]:
    """Yield files that are not ours, not of this version, or do not hold what was sealed."""
    table, data = layout(TENSORS)
    yield "foreign", "bare", frame(compact(table).encode(), data)
    yield "foreign", "nothing", frame(b"{}")
    yield "foreign", "torch", frame(compact({"__metadata__": {"format": "pt"}, **table}).encode(), data)
    if version == "1":
        yield "foreign", "no-header", forge(convexbn=None)
        yield from number("metadata-format", (forge(format=value) for value in [1, ["1"], {}, True]))
        yield from number("metadata-header", (forge(convexbn=value) for value in [1, [], HEADER, False]))
    else:
        yield from number("metadata-header", (forge(header=value) for value in [None, 1, [], HEADER, False]))
        yield from number("version-format", (forge(format=value) for value in [1, ["2"], {}, True]))
        texts = ["[]", "{", '{"format":"2","format":"2"}', "null", "\ud800"]
        yield from number("json-seal", (sealed_by(text) for text in texts))
    others = [None, [], "1", 1]
    yield from number("metadata", (frame(compact({"__metadata__": other}).encode()) for other in others))
    versions = ["", "0", "3", "1.0", "01", " 1", "1\n", "one", "9" * 5000, None]
    yield from number("version", (forge(format=version) for version in versions))
    right = re.search(rb"[0-9a-f]{64}", SOUND)[0].decode()
    wrong = [None, "", right.upper(), right[:-1], right + "0", "0" * 64, right + " ", "0" * 40, "é" * 64]
    yield from number("digest", (forge(sha256=digest) for digest in wrong))
    yield "digest", "name", swap(b'"weight"', b'"weighs"')
    yield "digest", "dtype", swap(b'{"dtype":"F32"', b'{"dtype":"I32"')
    yield "digest", "shape", swap(b'"shape":[2,3]', b'"shape":[3,2]')
    yield "digest", "dimension", swap(b'"shape":[2,1]', b'"shape":[2]')
    yield "digest", "header", swap(b"0.1}", b"0.2}")
    yield "digest", "space", swap(b"0.1}", b"0.1 }")
    yield "digest", "value", SOUND[:-1] + b"\0"


def bad_values() -> Iterator[Case]:
    """Yield sealed files that hold what no model may."""
    for bits in [0x7FF8 << 48, 0xFFF8 << 48, (0x7FF0 << 48) + 1, 0x7FF0 << 48, 0xFFF0 << 48]:
        for place in [0, 5]:
            chunk = struct.pack("<6Q", *(bits if i == place else 0 for i in range(6)))
            yield "values", f"{bits:x}-{place}", forge(tensors={**TENSORS, "weight": ("F64", [2, 3], chunk)})
    for bits in [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7F800000, 0xFF800000]:
        yield "values", f"{bits:x}", forge(tensors={"scale": ("F32", [], struct.pack("<I", bits))})
    for value in [2, 128, 255]:
        yield "values", f"bool-{value}", forge(tensors={"kept": ("BOOL", [3], bytes([1, value, 0]))})


class Canary:
    """Creates the canary file when it is unpickled."""

    def __reduce__(self):
        return open, (CANARY, "w")


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def other_formats() -> Iterator[Case]:
    """Yield what is given by mistake or on purpose instead of a model."""
    things = [Canary(), {"a": [1.0]}, [1, "a"], {"canary": Canary()}]
    yield from number("pickle", (pickle.dumps(thing, protocol) for thing in things for protocol in range(6)))
    canary = pickle.dumps(Canary(), 2)
    yield "torch", "model.pt", zipped({"archive/data.pkl": canary, "archive/version": b"3\n"})
    yield "torch", "flat.pt", zipped({"data.pkl": canary})
    yield "zip", "arrays.npz", zipped({"a.npy": b"\x93NUMPY" + canary})
    yield "zip", "model.skops", zipped({"schema.json": b"{}", "canary.pkl": canary})
    yield "zip", "empty.zip", zipped({})
    yield "compressed", "canary.gz", gzip.compress(canary, mtime=0)
    yield "compressed", "sound.gz", gzip.compress(SOUND, mtime=0)
    yield "compressed", "canary.bz2", bz2.compress(canary)
    yield "compressed", "canary.xz", lzma.compress(canary)
    yield "compressed", "canary.zst", b"\x28\xb5\x2f\xfd" + canary
    yield "hdf5", "weights.h5", b"\x89HDF\r\n\x1a\n" + bytes(100)
    yield "image", "plot.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(100)
    yield "image", "photo.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(100)
    yield from number("html", [b"<!DOCTYPE html>\n<a>", b"\n\n <html></html>", b"\xef\xbb\xbf<?xml?>"])
    yield from number("jsontext", [b'{"weights": [1.0, 2.0]}', b"[[1, 2],\n [3, 4]]", b"  {}"])
    yield from number("text", [b"a,b\n1,2\n" * 100, b"cat\ndog\npig\n", "Größe: 3\n".encode(), b"\n"])
    yield "unknown", "array.npy", b"\x93NUMPY\x01\x00" + bytes(118) + canary
    yield "unknown", "zeros", bytes(1000)
    yield "unknown", "noise", random.Random(0).randbytes(1000)
    yield "unknown", "program", b"\x7fELF\x02\x01\x01" + bytes(100)


def quoted(pattern: str) -> bytes:
    """Return a part of the metadata with the version in it, as the table has it."""
    text = pattern.replace("%s", version)
    return (text if version == "1" else text.replace('"', '\\"')).encode()


def sealed_by(text: str) -> bytes:
    """Return a file whose metadata is a text."""
    table, data = layout(TENSORS)
    return frame(json.dumps({"__metadata__": {"convexbn": text}, **table}, separators=(",", ":")).encode(), data)


def corpus() -> Iterator[Case]:
    """Yield the kind of refusal, the name and the content of each file, of both formats."""
    for number in ("1", "2"):
        of_version(number)
        for kind, name, content in of_this_version():
            yield kind, f"{number}/{name}", content


def of_this_version() -> Iterator[Case]:
    """Yield the kind of refusal, the name and the content of each file."""
    for part in [damaged, bad_json, bad_tables, bad_metadata, bad_values, other_formats]:
        for kind, name, content in part():
            yield kind.split("-")[0], name, content


def main(folder: Path) -> None:
    for kind, name, content in corpus():
        path = folder / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
