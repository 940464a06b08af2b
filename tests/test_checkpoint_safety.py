"""Checkpoints on disk: damage, foreign files and malice are errors, and a file is written whole or not at all."""

import errno
import io
import json
import os
import pickle
import random
import re
import resource
import socket
import stat
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

import checkpoint_files
import jaxoptim
from checkpoint_files import NAME, forbidden, header_of
from jaxoptim import checkpoint
from jaxoptim.checkpoint.file import _checksum


def crafted(path, tree, arrays=None, **changes):
    """A file of anybody, with a checksum that is right."""
    arrays = {} if arrays is None else arrays
    content = changes.pop("text", None) or json.dumps({"format": 1, "jaxoptim": "0", "tree": tree} | changes)
    metadata = {"jaxoptim": content, "sha256": _checksum(content, arrays)}
    safetensors.numpy.save_file(arrays, path, metadata=metadata)
    return path


def small(folder):
    """A small file, and one before it."""
    tree = {"f": jnp.arange(2.0), "c": np.ones(1, complex), "k": jax.random.key(0), "t": (1, None, "x", -0.5)}
    for _ in range(2):
        checkpoint.save(folder / NAME, tree, keep=2)
    return folder / NAME, (folder / NAME).read_bytes()


def check_damaged(path, raw):
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        checkpoint.load(path)
    assert str(path.with_name("run.safetensors.1")) in str(caught.value)


BITS = [pytest.param(slice(part, None, 8), id=f"{part}/8", marks=pytest.mark.slow) for part in range(8)]


@pytest.mark.parametrize("some", [pytest.param(slice(3, None, 23), id="sample"), *BITS])
def test_every_flipped_bit_is_seen(some, tmp_path):
    path, raw = small(tmp_path)
    for bit in range(8 * len(raw))[some]:
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        check_damaged(path, flipped)


@pytest.mark.slow
def test_every_truncation_and_extension_is_seen(tmp_path):
    path, raw = small(tmp_path)
    for size in range(len(raw)):
        check_damaged(path, raw[:size])
    for more in (b"\0", b"x" * 1000, raw):
        check_damaged(path, raw + more)
    rng = random.Random(0)
    for _ in range(200):
        start = rng.randrange(len(raw))
        zeroed = raw[:start] + bytes(min(64, len(raw) - start)) + raw[start + 64 :]
        if zeroed != raw:
            check_damaged(path, zeroed)


def test_arrays_that_change_places_are_seen(tmp_path):
    path = tmp_path / NAME
    checkpoint.save(path, {"aaaa": np.arange(2.0), "bbbb": np.arange(2.0) + 5})
    raw = path.read_bytes()
    for old, new in ((b'"aaaa":', b'"cccc":'), (b'"bbbb":', b'"aaaa":'), (b'"cccc":', b'"bbbb":')):
        assert raw.count(old) == 1
        raw = raw.replace(old, new)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(path)


def test_an_error_through_a_link_names_the_earlier_checkpoint_too(tmp_path):
    (tmp_path / "real").mkdir()
    path, raw = small(tmp_path / "real")
    path.write_bytes(raw[:-1])
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    with pytest.raises(ValueError, match=re.escape("run.safetensors.1")):
        checkpoint.load(link)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def by_torch(path, payload, zipped=True):
    torch.save({"w": torch.ones(2), "x": payload}, path, _use_new_zipfile_serialization=zipped)


def by_numpy(save, x):
    file = io.BytesIO()
    save(file, x)
    return file.getvalue()


FOREIGN = {
    "torch": (by_torch, r"torch\.save or pickle.*weights_only"),
    "torch-legacy": (lambda path, x: by_torch(path, x, zipped=False), r"torch\.save or pickle"),
    "pickle": (lambda path, x: path.write_bytes(pickle.dumps(x)), r"torch\.save or pickle"),
    "pickle-0": (lambda path, x: path.write_bytes(pickle.dumps(x, 0)), "no checkpoint"),
    "npy": (lambda path, x: path.write_bytes(by_numpy(np.save, np.array([x]))), "no checkpoint"),
    "npz": (lambda path, x: path.write_bytes(by_numpy(np.savez, np.array([x]))), r"torch\.save or pickle"),
    "empty": (lambda path, x: path.write_bytes(b""), "no checkpoint"),
    "random": (lambda path, x: path.write_bytes(random.Random(0).randbytes(5000)), "no checkpoint"),
    "zeros": (lambda path, x: path.write_bytes(bytes(5000)), "no checkpoint"),
    "text": (lambda path, x: path.write_text("import os; os.mkdir('x')"), "no checkpoint"),
    "safetensors": (lambda path, x: safetensors.numpy.save_file({"w": np.ones(2)}, path), "no checkpoint of jaxoptim"),
    "no-arrays": (lambda path, x: safetensors.numpy.save_file({}, path, {"format": "pt"}), "no checkpoint of jaxoptim"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "message"), FOREIGN.values(), ids=FOREIGN)
def test_files_of_others_are_named_and_not_run(write, message, tmp_path):
    path, made = tmp_path / NAME, tmp_path / "made"
    write(path, Payload(made))
    for like in (None, {"w": jnp.ones(2)}):
        with pytest.raises(ValueError, match=message) as caught:
            checkpoint.load(path, like)
        assert str(path) in str(caught.value)
    assert not made.exists()


def test_a_file_that_is_not_there_is_that_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / NAME)
    with pytest.raises(FileNotFoundError, match="folder"):
        checkpoint.save(tmp_path / "none" / NAME, {})


NEWER = {
    "same-body": '{"format": 3, "jaxoptim": "9.0", "tree": {"dict": []}}',
    "other-body": '{"format": 3, "jaxoptim": "9.0", "tree": {"quantum": 1}}',
    "no-tree": '{"format": 3, "jaxoptim": "9.0", "body": []}',
    "much-newer": '{"format": 1000, "jaxoptim": "9.0", "tree": 1}',
}


@pytest.mark.parametrize("text", NEWER.values(), ids=NEWER)
def test_a_newer_format_says_what_to_upgrade(text, tmp_path):
    path = crafted(tmp_path / NAME, None, {"w": np.ones(2)}, text=text)
    with pytest.raises(ValueError, match=r"format 1?0*3?, of jaxoptim 9\.0.*Upgrade") as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)


ARRAYS = {"a": np.arange(4, dtype=np.uint8).reshape(1, 4), "u": np.zeros(2, np.uint32), "e": np.zeros((0, 4), np.uint8)}
HOSTILE = [
    {}, {"x": 1}, {"list": []}, {"__class__": "os.system"}, {"__reduce__": ["os.system", ["true"]]}, {"dict": 5},
    {"dict": None}, {"dict": "ab"}, {"dict": {"a": 1}}, {"dict": ["ab"]}, {"dict": [["a"]]}, {"dict": [["a", 1, 2]]},
    {"dict": [[[1], 2]]}, {"dict": [[{"dict": []}, 2]]}, {"dict": [[{"array": "a"}, 2]]},
    {"dict": [[{"numpy": "a"}, 2]]}, {"dict": [], "class": "os.system"}, {"dict": [], "class": {"a": 1}, "names": []},
    {"dict": [], "class": "A", "names": 5}, {"dict": [], "class": "A", "names": [5]},
    {"dict": [], "class": "A", "names": [[{"x": 1}]]}, {"Counter": [[["x"], 1]]}, {"tuple": 5}, {"tuple": {"a": 1}},
    {"OrderedDict": 1}, {"Counter": {}}, {"defaultdict": []}, {"set": [1]}, {"float": []}, {"float": "1"}, {"float": 1},
    {"float": None}, {"complex": 1}, {"complex": [1, 2, 3]}, {"complex": ["1", 2]}, {"complex": ["abc"]},
    {"complex": [[1], 0]}, {"complex": [None, 0]}, {"complex": [10**400, 0]}, {"complex": []}, {"array": "no"},
    {"array": 5}, {"array": None}, {"array": ["a"]}, {"numpy": "no"}, {"numpy": {"array": "a"}},
    {"array": "a", "dtype": "object"}, {"numpy": "a", "dtype": "object"}, {"numpy": "a", "dtype": "O"},
    {"array": "a", "dtype": "datetime64"}, {"numpy": "a", "dtype": "datetime64[s]"}, {"numpy": "a", "dtype": "M8[D]"},
    {"array": "a", "dtype": "S4"}, {"numpy": "a", "dtype": "S4"}, {"numpy": "a", "dtype": "V4"},
    {"numpy": "a", "dtype": "<U1"}, {"array": "a", "dtype": "i2,i2"}, {"numpy": "a", "dtype": "i2,i2"},
    {"numpy": "a", "dtype": [["a", "i4"]]}, {"numpy": "a", "dtype": {"names": ["a"], "formats": ["i4"]}},
    {"numpy": "a", "dtype": 5}, {"numpy": "a", "dtype": None}, {"numpy": "a", "dtype": "(,f4"},
    {"array": "a", "dtype": "(1,f4"}, {"numpy": "a", "dtype": "(2,)i2"}, {"numpy": "a", "dtype": ""},
    {"numpy": "a", "dtype": "(99999999999,)f4"}, {"numpy": "a", "dtype": "float64"}, {"array": "a", "dtype": ">f4"},
    {"numpy": "a", "dtype": "os.system"}, {"numpy": "e", "dtype": "(2,)V2"}, {"array": "u", "dtype": "float32"},
    {"array": "u", "key": "os.system"}, {"array": "u", "key": 5}, {"array": "u", "key": None},
    {"array": "u", "key": []}, {"array": "u", "key": {"a": 1}}, {"array": "u", "key": "rbg"},
    {"array": "a", "key": "threefry2x32"}, {"node": 5, "type": "OptState"},
    {"node": None, "type": "OptState"}, {"node": "", "type": "OptState"}, {"node": []},
    {"node": [["foo", 1]], "type": "OptState"}, {"node": [["step", 1]], "type": "OptState"},
    {"node": [], "type": "OptState"}, {"node": [[["x"], 1]], "type": "OptState"},
    {"node": [[1, 1]], "type": "OptState"}, {"node": [["a", 1]], "type": "os.system"},
    {"node": [["a", 1]], "type": ["x"]}, {"node": [["a", 1]], "type": 5}, {"node": [["a", 1]], "type": None},
]  # fmt: skip
LIKES = [None, *({"q": x} for x in (jnp.zeros(()), jnp.zeros(1), 1.0, np.zeros((1, 4)), jaxoptim.OptState(1, 2, 3)))]


@pytest.mark.parametrize("tree", HOSTILE, ids=lambda tree: str(tree)[:80])
def test_malice_with_a_right_checksum_is_only_an_error(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "system", forbidden)
    for root in (tree, {"dict": [["q", tree]]}, {"tuple": [[tree]]}):
        path = crafted(tmp_path / NAME, root, ARRAYS)
        with pytest.raises(ValueError, match="checkpoint"):
            checkpoint.load(path)
    path = crafted(tmp_path / NAME, {"dict": [["q", tree]]}, ARRAYS)
    for like in (*LIKES, {"q": jax.random.key(0)}):
        with pytest.raises(ValueError, match=r"checkpoint|in like"):
            checkpoint.load(path, like)


TEXTS = {
    "no-object": "[1]",
    "no-version": '{"tree": 1}',
    "version-is-text": '{"format": "1", "tree": 1}',
    "version-is-a-list": '{"format": [], "tree": 1}',
    "no-tree": '{"format": 1}',
    "deep-lists": f'{{"format": 1, "tree": {"[" * 100_000}{"]" * 100_000}}}',
    "deeper-than-the-stack": f'{{"format": 1, "tree": {"[" * 900}{"]" * 900}}}',
    "deep-complex": '{"format": 1, "tree": ' + '{"complex": [' * 400 + "]}" * 400 + "}",
    "deep-nodes": '{"format": 1, "tree": ' + '{"node": [["a", ' * 20_000 + "1" + ']], "type": "T"}' * 20_000 + "}",
    "huge-integer": f'{{"format": 1, "tree": {"9" * 100_000}}}',
    "parts-of-no-sense": '{"format": 2, "tree": 1, "parts": []}',
    "parts-without-arrays": '{"format": 2, "tree": 1, "parts": {"folder": "x"}}',
    "parts-elsewhere": '{"format": 2, "tree": 1, "parts": {"folder": "../x", "arrays": []}}',
    "parts-above": '{"format": 2, "tree": 1, "parts": {"folder": "..", "arrays": []}}',
    "parts-of-objects": '{"format": 2, "tree": 1, "parts": {"folder": "x", "arrays": [["a", [1], "object"]]}}',
    "parts-of-no-shape": '{"format": 2, "tree": 1, "parts": {"folder": "x", "arrays": [["a", ["b"], "int8"]]}}',
    "huge-version": f'{{"format": {"9" * 4000}, "tree": 1}}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_metadata_of_no_sense_is_an_error(text, tmp_path):
    with pytest.raises(ValueError, match=re.escape(NAME)) as caught:
        checkpoint.load(crafted(tmp_path / NAME, None, text=text))
    assert len(str(caught.value)) < 10_000


def test_a_file_without_its_folder_says_so(tmp_path):
    text = '{"format": 2, "tree": {"array": "a"}, "parts": {"folder": "x.parts", "arrays": [["a", [99], "int8"]]}}'
    with pytest.raises(
        FileNotFoundError, match=r"in the folder .*x\.parts, which is not there\. Move it with the file"
    ):
        checkpoint.load(crafted(tmp_path / NAME, None, text=text))


def raw_file(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(shape, begin=0, end=8, dtype="F32"):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


HEADERS = {
    "huge-header": raw_file({}, size=2**63),
    "large-header": raw_file({}, size=2**33),
    "huge-shape": raw_file(entry([2**40]), bytes(8)),
    "overflowing-shape": raw_file(entry([2**32, 2**32, 2]), bytes(8)),
    "empty-huge": raw_file(entry([0, 2**62, 2**62], 0, 0)),
    "negative": raw_file(entry([-2]), bytes(8)),
    "outside": raw_file(entry([2], 2**40, 2**40 + 8), bytes(8)),
    "overlapping": raw_file(entry([2]) | {"v": entry([2], 4, 12)["w"]}, bytes(12)),
    "dtype": raw_file(entry([1], dtype="OBJECT"), bytes(8)),
    "list": raw_file([1]),
    "no-json": raw_file(b"\xff{}"),
    "metadata-of-lists": raw_file({"__metadata__": {"jaxoptim": [1], "sha256": "0"}}),
    "deep": raw_file(b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
}


@pytest.mark.parametrize("raw", HEADERS.values(), ids=HEADERS)
def test_a_header_of_no_sense_takes_no_memory(raw, tmp_path):
    (tmp_path / NAME).write_bytes(raw)
    checkpoint.load(checkpoint_files.path_of(1))  # the imports
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=re.escape(NAME)):
            checkpoint.load(tmp_path / NAME)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


NASTY = [None, True, -1, 10**30, 1e308, "", "a", "object", [], {}, [[]], [1, 2], {"a": 1}, [["a", 1]], {"array": "a"}]


def mutated(x, rng):
    """The tree with one place changed, chosen so that each depth has its share."""
    if rng.random() < 0.15 or not isinstance(x, list | dict) or not x:
        return rng.choice(NASTY)
    x = x.copy()
    key = rng.choice(list(x) if isinstance(x, dict) else range(len(x)))
    kind = rng.random()
    if kind < 0.08:
        x.pop(key)
    elif kind < 0.16 and isinstance(x, dict):
        x = {rng.choice(["dict", "tuple", "node", "complex", "numpy", "float", "Counter"]): x.pop(key), **x}
    else:
        x[key] = mutated(x[key], rng)
    return x


@pytest.mark.costly
@pytest.mark.parametrize("seed", range(4))
def test_mutations_of_a_file_load_or_are_an_error(seed, tmp_path):
    tree = header_of(checkpoint_files.path_of(1))[1]["tree"]
    arrays, rng, like = safetensors.numpy.load_file(checkpoint_files.path_of(1)), random.Random(seed), None
    arrays = {name: x for name, x in arrays.items() if x.size < 100}
    others, errors = {}, 0
    for _ in range(60):
        bad = mutated(tree, rng)
        path = crafted(tmp_path / NAME, bad, arrays)
        for like in (None, {"JAX": jnp.zeros(1)}):
            try:
                checkpoint.load(path, like)
            except ValueError:
                errors += 1
            except Exception as error:
                others.setdefault((type(error).__name__, str(error)[:80]), bad)
    assert errors > 30
    assert not others, list(others)


# Whole or not at all.


class Full(OSError):
    pass


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


FAILURES = {
    "replace": lambda patch: patch.setattr(Path, "replace", raising(Full())),
    "fsync": lambda patch: patch.setattr(os, "fsync", raising(Full())),
    "write": lambda patch: patch.setattr(safetensors.numpy, "save_file", raising(Full())),
    "interrupt": lambda patch: patch.setattr(os, "fsync", raising(KeyboardInterrupt())),
    "memory": lambda patch: patch.setattr(json, "dumps", raising(MemoryError())),
    "mode": lambda patch: patch.setattr("shutil.copymode", raising(Full())),
}


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_save_that_fails_leaves_all_as_it_was(failure, keep, tmp_path, monkeypatch):
    path = tmp_path / NAME
    for n in (1, 2):
        checkpoint.save(path, n, keep=keep)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        failure(patch)
        with pytest.raises((Full, KeyboardInterrupt, MemoryError)):
            checkpoint.save(path, 3, keep=keep)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(TypeError, match=r"'a\.1'"):
        checkpoint.save(path, {"w": np.ones(2), "a": [1, print]}, keep=keep)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    checkpoint.save(path, 4, keep=keep)
    assert checkpoint.load(path) == 4


def test_a_full_disk_is_an_error_of_the_disk_and_the_old_file_stays(tmp_path):
    checkpoint.save(tmp_path / NAME, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(NAME)) as caught:
            checkpoint.save(tmp_path / NAME, np.ones(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno in (None, errno.EFBIG)
    assert os.listdir(tmp_path) == [NAME]
    assert checkpoint.load(tmp_path / NAME) == 1


def kept(path):
    """What the checkpoints hold, the newest first."""
    names = [path, *(path.with_name(f"{path.name}.{n}") for n in range(1, 9))]
    return [checkpoint.load(name) if name.exists() else None for name in names]


@pytest.mark.parametrize("name", [NAME, "run", "run.v2.safetensors", "r[1]*.safetensors"])
def test_the_last_checkpoints_are_kept_in_order(name, tmp_path):
    path = tmp_path / name
    for n in range(1, 7):
        checkpoint.save(path, n, keep=4)
        assert kept(path)[:5] == [n, *(n - k if n > k else None for k in (1, 2, 3)), None]
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("crash", range(1, 5))
@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_no_checkpoint_is_lost_when_keeping_is_cut_short(crash, links, tmp_path, monkeypatch):
    path, replace, done = tmp_path / NAME, Path.replace, []

    def replace_some(self, target):
        if len(done) == crash - 1:
            raise Full
        done.append(target)
        return replace(self, target)

    if not links:
        monkeypatch.setattr(os, "link", raising(OSError(errno.EPERM, "no links")))
    for n in range(1, 6):
        checkpoint.save(path, n, keep=4)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_some)
        with pytest.raises(Full):
            checkpoint.save(path, 6, keep=4)
    assert kept(path)[0] == 5
    left = [n for n in kept(path) if n is not None]
    assert left == sorted(left, reverse=True)
    assert set(left) >= {5, 4, 3}
    checkpoint.save(path, 7, keep=4)
    assert kept(path) == [7, 5, 4, 3, *[None] * 5]


@pytest.mark.parametrize("keep", [0, -1, True, 1.0, "2", None], ids=repr)
def test_keep_must_be_a_positive_integer(keep, tmp_path):
    with pytest.raises(ValueError, match="keep is the number of checkpoints"):
        checkpoint.save(tmp_path / NAME, 1, keep=keep)


@pytest.mark.slow
def test_a_reader_always_finds_a_whole_checkpoint(tmp_path):
    path, seen, errors, stop = tmp_path / NAME, [], [], threading.Event()
    checkpoint.save(path, {"n": 0, "w": np.zeros(30_000)}, keep=2)
    checkpoint.save(path, {"n": 0, "w": np.zeros(30_000)}, keep=2)

    def read():
        while not stop.is_set():
            try:
                for name in (NAME, "run.safetensors.1"):
                    run = checkpoint.load(tmp_path / name)
                    assert (run["w"] == run["n"]).all()
                    seen.append(run["n"]) if name == NAME else None
            except BaseException as error:
                errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(1, 301):
        checkpoint.save(path, {"n": n, "w": np.full(30_000, n)}, keep=2)
    stop.set()
    reader.join()
    assert errors == []
    assert seen == sorted(seen)
    assert len(set(seen)) > 10


def test_leftovers_of_dead_processes_are_removed_and_no_others(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    name, host = "run[1].safetensors", socket.gethostname()
    stays = [
        f".{name}.{host}.{os.getppid()}.a.partial",  # of a process that runs
        f".{name}.{host}.1.a.partial",
        f".{name}.another-{host}.{process.pid}.a.partial",  # of another machine
        f".other-{name}.{host}.{process.pid}.a.partial",  # of another checkpoint
        f".{name}.{host}.{process.pid}.a.part",
    ]
    goes = [f".{name}.{host}.{process.pid}.{part}.partial" for part in "ab"]
    for left in (*stays, *goes):
        (tmp_path / left).mkdir()
        (tmp_path / left / name).write_bytes(b"half")
    checkpoint.save(tmp_path / name, 1)
    assert sorted(os.listdir(tmp_path)) == sorted([name, *stays])


def test_the_mode_of_the_old_file_is_kept(tmp_path):
    checkpoint.save(tmp_path / NAME, 1)
    for mode in (0o640, 0o444, 0o600):
        (tmp_path / NAME).chmod(mode)
        checkpoint.save(tmp_path / NAME, 2, keep=2)
        assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == mode


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    checkpoint.save(tmp_path / NAME, 1)
    assert (tmp_path / NAME).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    link, path = tmp_path / "link.safetensors", tmp_path / "real" / NAME
    link.symlink_to(Path("real") / NAME)
    for n in range(3):
        checkpoint.save(link, n, keep=2)
    assert link.is_symlink()
    assert kept(path)[:3] == [2, 1, None]
    assert checkpoint.load(link) == 2
    assert sorted(os.listdir(tmp_path)) == ["link.safetensors", "real"]
