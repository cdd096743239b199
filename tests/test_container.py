import builtins
import contextlib
import errno
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import secrets
import stat
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import hostile
from convexbn.files import model_file
from convexbn.files.atomic import write_atomically
from convexbn.files.model_file import FormatError, read, write

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals, links and permissions")
DTYPES = {code: np.dtype(kind) for kind, code in model_file._CODES.items()}
ARRAYS = {
    name: np.frombuffer(data, DTYPES[code]).reshape(shape) for name, (code, shape, data) in hostile.TENSORS.items()
}
OLD = {"old": np.arange(3.0)}


def same(left, right):
    """Tell whether two contents are the same to the last bit."""
    arrays, header = left
    others, other = right
    return (
        json.dumps(header, sort_keys=True) == json.dumps(other, sort_keys=True)
        and arrays.keys() == others.keys()
        and all(array.dtype == others[name].dtype for name, array in arrays.items())
        and all(array.shape == others[name].shape for name, array in arrays.items())
        and all(array.tobytes() == others[name].tobytes() for name, array in arrays.items())
    )


@pytest.fixture
def path(tmp_path):
    """A file that holds `OLD`."""
    path = tmp_path / "model.safetensors"
    write(path, OLD, {"name": "old"})
    return path


def holds_old(path):
    """Tell whether the file is as the fixture made it, with nothing beside it."""
    return same(read(path), (OLD, {"name": "old"})) and os.listdir(path.parent) == [path.name]


# The format


def test_the_file_is_the_one_that_the_docstring_describes(path):
    write(path, ARRAYS, hostile.HEADER)
    assert path.read_bytes() == hostile.SOUND
    assert same(read(path), (ARRAYS, hostile.HEADER))


def test_safetensors_reads_it(path):
    write(path, ARRAYS, hostile.HEADER)
    assert same((safetensors.numpy.load_file(path), {}), (ARRAYS, {}))
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == hostile.seal(hostile.compact(hostile.HEADER), hostile.TENSORS)


def test_what_safetensors_writes_with_our_metadata_is_read(path):
    metadata = hostile.seal(hostile.compact(hostile.HEADER), hostile.TENSORS)
    safetensors.numpy.save_file(ARRAYS, path, metadata)
    assert same(read(path), (ARRAYS, hostile.HEADER))


def test_data_may_be_unaligned(path):
    size = struct.unpack("<Q", hostile.SOUND[:8])[0]
    parts = [struct.pack("<Q", size + 1), hostile.SOUND[8 : 8 + size], b" ", hostile.SOUND[8 + size :]]
    path.write_bytes(b"".join(parts))
    assert same(read(path), (ARRAYS, hostile.HEADER))


def test_equal_arguments_give_equal_bytes(tmp_path):
    write(tmp_path / "a", {"x": np.ones(2), "y": np.zeros(3)}, {"p": 1, "q": {"r": 2, "s": 3}})
    write(tmp_path / "b", {"y": np.zeros(3), "x": np.ones(2)}, {"q": {"s": 3, "r": 2}, "p": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=8)
TEXTS = st.text(max_size=8)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS | FLOATS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(TEXTS, children, max_size=4),
    max_leaves=12,
)


@st.composite
def any_array(draw):
    """Draw an array of an allowed type, of either byte order, contiguous or not."""
    dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str))).newbyteorder(draw(st.sampled_from("<>")))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    finite = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else None
    array = draw(hnp.arrays(dtype, shape, elements=finite and hnp.from_dtype(dtype, **finite)))
    turned = array.T if draw(st.booleans()) else array
    return turned[..., :: draw(st.sampled_from([1, -1, 2]))] if turned.ndim else turned


@given(arrays=st.dictionaries(NAMES, any_array(), max_size=5), header=st.dictionaries(TEXTS, JSONS))
@settings(max_examples=200, deadline=None)
def test_round_trip(tmp_path_factory, arrays, header):
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    write(path, arrays, header)
    content = read(path)
    native = {name: array.astype(array.dtype.newbyteorder("="), order="C") for name, array in arrays.items()}
    assert same(content, (native, header))
    assert same((safetensors.numpy.load_file(path), {}), (native, {}))
    for array in content[0].values():
        assert array.dtype.isnative and array.flags.c_contiguous and array.flags.writeable


def test_extreme_values_survive_whatever_the_caller_set(path):
    arrays = {"x": np.array([5e-324, -0.0, 1.7976931348623157e308]), "y": np.float32([1e-45, 3.4e38])}
    header = {"tiny": 5e-324, "long": 10**400, "seed": 2**128 - 1, "third": 1 / 3, "": "\ud800"}
    with np.errstate(all="raise"):
        write(path, arrays, header)
        assert same(read(path), (arrays, header))


def test_empty_arrays_may_be_wide(path):
    write(path, {"wide": np.zeros((0, 2**59))}, {})
    assert read(path)[0]["wide"].shape == (0, 2**59)


def test_the_largest_number_of_tensors(path):
    write(path, {f"t{i}": np.zeros(1) for i in range(1000)}, {})
    assert len(read(path)[0]) == 1000


# Damaged and hostile files


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """Return a function that says how a content is refused, and fails if it is not or if something runs."""
    monkeypatch.chdir(tmp_path)

    def refuse(content):
        Path("given").write_bytes(content)
        with pytest.raises(FormatError) as caught:
            read("given")
        assert os.listdir() == ["given"]
        return str(caught.value)

    return refuse


CORPUS = [pytest.param(kind, content, id=f"{kind}/{name}") for kind, name, content in hostile.corpus()]


@pytest.mark.parametrize(("kind", "content"), CORPUS)
def test_corpus(refusal, kind, content):
    message = refusal(content)
    assert re.search(hostile.KINDS[kind], message)
    assert re.fullmatch(r"given: [^\n]{10,300}: [^\n]{10,100}", message), "one line: file, reason, remedy"


def test_corpus_is_small_and_the_same_every_time():
    corpus = list(hostile.corpus())
    assert corpus == list(hostile.corpus())
    assert len({(kind, name) for kind, name, _ in corpus}) == len(corpus) >= 400
    assert sum(len(content) for _, _, content in corpus) < 2_000_000


def test_the_canary_sings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(hostile.Canary())).close()
    assert os.listdir() == [hostile.CANARY]


def test_truncated_at_every_byte(refusal):
    for size in range(len(hostile.SOUND)):
        refusal(hostile.SOUND[:size])


def test_a_thousand_flipped_bits(path):
    chance = random.Random(1)
    silent = 0
    for place in chance.sample(range(8 * len(hostile.SOUND)), 1000):
        flipped = bytearray(hostile.SOUND)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with contextlib.suppress(FormatError):
            assert same(read(path), (ARRAYS, hostile.HEADER))
            silent += 1
    assert silent == 0


@pytest.mark.parametrize(
    "table",
    [
        b"{" + b'"":0,' * 10**7,
        b'{"":' + b"[]," * 10**7,
        b'{"' + rb"\"" * 10**7,
        b'{"a":"' + rb"\u0000" * 10**7 + b'"}',
        b'{"a":' + b"[" * 10**7,
        b'{"a":' + b"1" * 10**7 + b"}",
        b'{"a":[' + b"1 " * 10**7 + b"]}",
        b'{"__metadata__":{"convexbn":"' + rb"{\"a\":[" + b"1," * 10**7 + b'1]}"}}',
    ],
    ids=["tensors", "arrays", "open-string", "escapes", "nesting", "digits", "no-commas", "header"],
)
def test_large_tables_need_little_memory(path, table):
    path.write_bytes(hostile.frame(table))
    tracemalloc.start()
    with pytest.raises(FormatError):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * len(table)


def test_ten_million_tensors_are_refused_before_they_are_parsed(path, monkeypatch):
    path.write_bytes(hostile.frame(b"{" + b'"":0,' * 10**7))
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("the table was parsed"))
    with pytest.raises(FormatError, match="over 32 levels or 1000000 items"):
        read(path)


def test_a_large_sealed_header_costs_little(path):
    path.write_bytes(hostile.forge('{"a":[' + "1," * 10**6 + "1]}"))
    with pytest.raises(FormatError, match="levels or 1000000 items"):
        read(path)


def test_a_table_beyond_the_bound_is_not_parsed(path):
    path.write_bytes(struct.pack("<Q", 10**8) + b"{")
    os.truncate(path, 10**8 + 8)
    with pytest.raises(FormatError, match="first bytes"):
        read(path)


@pytest.mark.parametrize("size", [2**32 + 1, 2**40])
def test_files_beyond_the_budget_are_not_read(path, size):
    os.truncate(path, size)
    with pytest.raises(FormatError, match="more than the 4294967296 allowed"):
        read(path)


@POSIX
@pytest.mark.parametrize("make", ["mkdir", "mkfifo", "symlink"])
def test_folders_pipes_and_devices_are_not_read(tmp_path, make):
    getattr(os, make)(*["/dev/zero"] * (make == "symlink"), tmp_path / "given")
    with pytest.raises(OSError, match="Not a regular file") as caught:
        read(tmp_path / "given")
    assert caught.value.filename == str(tmp_path / "given")


def test_a_name_with_nul_is_no_name(path):
    for attempt in (lambda: read(f"{path}\0"), lambda: write(f"{path}\0", *content(0))):
        with pytest.raises(OSError, match="cannot hold a NUL character"):
            attempt()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        read(tmp_path / "given")
    assert caught.value.filename == str(tmp_path / "given")


# What is not written

DEEP: list = []
for _ in range(10_000):
    DEEP = [DEEP]

NUMBERS = [np.nan, np.inf, -np.inf]
OTHER_DTYPES = ["f2", "g", "c8", "i1", "u4", "u8", "O", "U3", "S3", "M8[s]", "f8,f8"]
NOT_JSON = [*NUMBERS, 1j, {1}, b"a", np.zeros(1), np.int64(1), np.bool_(1), {1: 1, "b": 2}, DEEP, 10**5000]
REFUSED = [
    *(({"w": np.array([1.0, value])}, {}, "tensor 'w' holds NaN or infinity") for value in NUMBERS),
    *(({"w": np.array(value, np.float32)}, {}, "tensor 'w' holds NaN or infinity") for value in NUMBERS),
    *(({"w": np.zeros(2, dtype)}, {}, "tensor 'w' has dtype") for dtype in OTHER_DTYPES),
    *(({name: np.zeros(2)}, {}, "cannot be named") for name in ["__metadata__", "a\nb", "\0", "\ud800"]),
    ({f"t{i}": np.zeros(1) for i in range(1001)}, {}, "1001 tensors are more than"),
    *(({}, {"a": value}, "header is not JSON") for value in NOT_JSON),
    *(({}, {"a": value}, "would come back changed") for value in [(1, 2), {1: 2}, {None: 1}]),
    ({}, {"a": [0] * 1_000_000}, "1000000 items"),
    ({}, {"a": json.loads("[" * 32 + "]" * 32)}, "32 levels"),
]


@pytest.mark.parametrize(("arrays", "header", "message"), REFUSED)
def test_refused_before_anything_is_written(path, arrays, header, message):
    with pytest.raises(FormatError, match=message) as caught:
        write(path, arrays, header)
    assert str(caught.value).startswith(f"{path}: ")
    assert holds_old(path)


def test_files_beyond_the_budget_are_not_written(path, monkeypatch):
    monkeypatch.setattr(model_file, "_MAX_FILE_BYTES", 1000)
    with pytest.raises(FormatError, match="more than the 1000 allowed"):
        write(path, {"w": np.zeros(1000)}, {})
    assert holds_old(path)


# Failures of the system


def failing(error):
    def fail(*arguments, **keywords):
        raise error

    return fail


class FullDisk(io.FileIO):
    """A file whose disk is full after 40 bytes."""

    def write(self, data):
        if self.tell() + len(data) > 40:
            super().write(bytes(data)[:40])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EXDEV])
def test_any_failing_step_leaves_the_former_file(path, monkeypatch, step, code):
    with monkeypatch.context() as patch:
        patch.setattr(os, step, failing(OSError(code, os.strerror(code), "a", None, "b")))
        with pytest.raises(OSError, match=re.escape(os.strerror(code))) as caught:
            write(path, ARRAYS, {})
    assert caught.value.errno == code
    assert caught.value.filename == str(path) and caught.value.filename2 is None
    assert holds_old(path)


def test_a_full_disk_leaves_the_former_file(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", lambda name, mode, opener: FullDisk(name, mode, opener=opener))
        with pytest.raises(OSError, match="No space left") as caught:
            write(path, ARRAYS, {})
    assert caught.value.filename == str(path)
    assert holds_old(path)


def test_any_bytes_are_written_in_the_same_way(path, monkeypatch):
    write_atomically(path, hostile.SOUND)
    assert path.read_bytes() == hostile.SOUND and os.listdir(path.parent) == [path.name]
    monkeypatch.setattr(os, "replace", failing(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken") as caught:
        write_atomically(path, b"new")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == hostile.SOUND and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), SystemExit(1)])
def test_interrupts_pass_and_leave_the_former_file(path, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(error))
        with pytest.raises(type(error)):
            write(path, ARRAYS, {})
    assert holds_old(path)


LIMITED = """
import resource, signal, sys
import numpy as np
from convexbn.files.model_file import write
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write(sys.argv[1], {"w": np.zeros(100_000)}, {})
except OSError as error:
    assert error.filename == sys.argv[1], error
    sys.exit(7)
"""


@POSIX
def test_a_limit_of_the_system_leaves_the_former_file(path):
    assert subprocess.run([sys.executable, "-c", LIMITED, path], timeout=60).returncode == 7
    assert holds_old(path)


@POSIX
@pytest.mark.parametrize(("code", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_sync_of_the_folder(path, monkeypatch, code, raises):
    fsync, folders = os.fsync, []

    def sync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            folders.append(os.fstat(descriptor).st_ino)
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match=re.escape(str(path))) if raises else contextlib.nullcontext():
        write(path, ARRAYS, hostile.HEADER)
    assert folders == [path.parent.stat().st_ino]
    assert same(read(path), (ARRAYS, hostile.HEADER))


def test_data_are_synced_before_they_are_renamed(path, monkeypatch):
    steps, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: steps.append("sync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda old, new: steps.append("rename") or replace(old, new))
    write(path, ARRAYS, {})
    assert steps[:2] == ["sync", "rename"]


PLACES = ["missing/model", "folder", "file/model", "device", "pipe", "loop", "n" * 300]


@POSIX
@pytest.mark.parametrize("place", PLACES)
def test_impossible_places_are_named(tmp_path, monkeypatch, place):
    if place == "device":  # which a faulty `write` would take from the whole machine
        monkeypatch.setattr(os, "replace", failing(AssertionError("a device would be replaced")))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.symlink("/dev/full", tmp_path / "device")
    os.mkfifo(tmp_path / "pipe")
    os.symlink("loop", tmp_path / "loop")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OSError, match=place[:9]) as caught:
        write(tmp_path / place, ARRAYS, {})
    assert caught.value.filename == str(tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == before and os.listdir(tmp_path / "folder") == []
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


# Names, links, permissions


@POSIX
def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(path, monkeypatch):
    victim = path.parent / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(secrets, "token_hex", lambda size: "guessed")
    os.symlink("victim", path.parent / f".{path.name}.guessed.tmp")
    with pytest.raises(FileExistsError):
        write(path, ARRAYS, {})
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["my model.safetensors", "Modell ä 模型 🙂", "-", ".hidden", "模" * 85, "'"])
def test_any_name(tmp_path, name):
    for header in [{"a": 1}, {"a": 2}]:
        write(tmp_path / name, ARRAYS, header)
        assert same(read(str(tmp_path / name)), (ARRAYS, header))
    assert os.listdir(tmp_path) == [name]


def test_relative_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("model", ARRAYS, {})
    assert os.listdir(tmp_path) == ["model"]


@POSIX
@pytest.mark.parametrize("former", [True, False], ids=["former", "dangling"])
def test_symbolic_links_are_written_through(tmp_path, former):
    (tmp_path / "store").mkdir()
    target = tmp_path / "store" / "target"
    if former:
        write(target, OLD, {})
    os.symlink("store/target", tmp_path / "one")
    os.symlink("one", tmp_path / "two")
    write(tmp_path / "two", ARRAYS, {})
    assert same(read(target), (ARRAYS, {})) and same(read(tmp_path / "two"), (ARRAYS, {}))
    assert os.readlink(tmp_path / "two") == "one" and os.readlink(tmp_path / "one") == "store/target"
    assert os.listdir(tmp_path / "store") == ["target"]


@POSIX
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_usual_permissions(tmp_path, umask, mode):
    former = os.umask(umask)
    try:
        write(tmp_path / "model", ARRAYS, {})
    finally:
        os.umask(former)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == mode


@POSIX
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o444])
def test_a_former_file_keeps_its_permissions_from_the_first_byte(path, monkeypatch, mode):
    seen, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: seen.append(os.fstat(file).st_mode) or fsync(file))
    path.chmod(mode)
    write(path, ARRAYS, {})
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert stat.S_IMODE(seen[0]) & ~mode == 0


# Several writers, and sudden death


def content(number):
    return {"w": np.full(50_000, float(number))}, {"number": number}


def whole(path):
    """Tell whether the file is one of the contents."""
    arrays, header = read(path)
    return same((arrays, header), content(header["number"]))


def write_for_ever(path, started):
    for number in range(1, 1_000_000):
        write(path, *content(number))
        started.set()


@POSIX
def test_kill_at_random_instants(tmp_path):
    chance, fork = random.Random(2), multiprocessing.get_context("fork")
    path = tmp_path / "model"
    write(path, *content(0))
    for _ in range(20):
        started = fork.Event()
        writer = fork.Process(target=write_for_ever, args=(path, started))
        writer.start()
        assert started.wait(60)
        time.sleep(chance.uniform(0, 0.02))
        writer.kill()
        writer.join()
        assert whole(path)
        assert all(re.fullmatch(r"model|\.model\.[0-9a-f]{16}\.tmp", name) for name in os.listdir(tmp_path))


def test_writers_at_once(tmp_path):
    path = tmp_path / "model"
    write(path, *content(0))
    threads = [
        threading.Thread(target=lambda number=number: [write(path, *content(number)) for _ in range(10)])
        for number in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert whole(path)
    for thread in threads:
        thread.join()
    assert whole(path) and os.listdir(tmp_path) == ["model"]
