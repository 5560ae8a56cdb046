"""Optimised graphs on disk: found again where they fit, made again where they do not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import convert_model_to_external_data

from gateway.serving import graphcache, onnxfile, session_opening
from gateway.serving.graphcache import KEPT_ENTRIES, SMALLEST_CACHED_BYTES
from gateway.serving.plan import Execution
from gateway.serving.session import ModelSession
from tests.zoo.building import parse

X = np.linspace(-1, 1, 3 * 512, dtype=np.float32).reshape(3, 512)


def network(scale: float = 1) -> onnx.ModelProto:
    """A little over a megabyte, with something to optimise."""
    w = np.random.default_rng(0).standard_normal((512, 520)).astype(np.float32) * scale
    return parse(
        "(float[n, 512] x) => (float[n, 520] y) "
        "{ p = MatMul (x, w)  s = Add (p, b)  r = Relu (s)  i = Identity (r)  y = Tanh (i) }",
        w=w,
        b=np.ones(520, np.float32),
    )


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "repository" / "m" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(network(), path)
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def opened(monkeypatch):
    """The files that ONNX Runtime opened, in order."""
    seen = []
    start = session_opening._start

    def spy(path, *args, **options):
        seen.append(path)
        return start(path, *args, **options)

    monkeypatch.setattr(session_opening, "_start", spy)
    return seen


def load(model, folder, **execution) -> ModelSession:
    cache = None if folder is None else str(folder)
    return ModelSession(model, onnxfile.examine(model), Execution(cache_folder=cache, **execution))


def run(session: ModelSession) -> bytes:
    return session.run_arrays({"x": X})[0].tobytes()


def entries(folder) -> list:
    """The entries in the folder, which must hold nothing but them and the digest of each."""
    found = sorted(folder.iterdir())
    made = [path for path in found if path.suffix == ".onnx"]
    assert found == sorted(made + [path.with_name(f"{path.name}.sha256") for path in made])
    return made


def test_the_second_load_opens_the_entry_and_answers_the_same(model, folder, opened):
    first, plain = run(load(model, folder)), run(load(model, None))
    (entry,) = entries(folder)
    assert run(load(model, folder)) == first == plain
    assert opened == [model, model, entry]
    assert entries(folder) == [entry]


def test_an_entry_serves_other_processes(model, folder):
    code = textwrap.dedent(f"""
        from pathlib import Path
        import numpy as np
        from gateway.serving import onnxfile, session, session_opening
        from gateway.serving.plan import Execution
        start, path = session_opening._start, Path({str(model)!r})
        session_opening._start = lambda path, *a, **o: print(path.name) or start(path, *a, **o)
        x = np.linspace(-1, 1, 3 * 512, dtype=np.float32).reshape(3, 512)
        execution = Execution(cache_folder={str(folder)!r})
        opened = session.ModelSession(path, onnxfile.examine(path), execution)
        print(opened.run_arrays({{"x": x}})[0].tobytes().hex())
    """)
    first = run(load(model, folder)).hex()
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [entries(folder)[0].name, first]


def change_weights(model):
    onnx.save(network(scale=2), model)


def nothing(model):
    """The plain case, as a check of the test itself."""


CHANGES = {
    "an option": (nothing, {"graph_optimization": "basic"}),
    "an entry of the session's configuration": (nothing, {"config": (("a.key", "1"),)}),
    "an option of the provider": (nothing, {"provider_options": (("key", "1"),)}),
    "the weights": (change_weights, {}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_shapes_the_graph_makes_another_entry(model, folder, opened, name):
    change, options = CHANGES[name]
    load(model, folder)
    (before,) = entries(folder)
    change(model)
    run(load(model, folder, **options))
    assert opened == [model, model]
    assert len(entries(folder)) == 2
    assert before in entries(folder)


@pytest.mark.parametrize(
    "options", [{"threads": 2}, {"memory_pattern": False}, {"cpu_arena": False}]
)
def test_what_does_not_shape_the_graph_uses_the_same_entry(model, folder, opened, options):
    load(model, folder)
    load(model, folder, **options)
    assert opened == [model, *entries(folder)]


def test_changed_weights_give_changed_answers(model, folder):
    before = run(load(model, folder))
    change_weights(model)
    after = run(load(model, folder))
    assert before != after
    assert after == run(load(model, None))


@pytest.mark.parametrize("name", ["runtime", "device", "cpu"])
def test_another_runtime_device_or_cpu_makes_another_entry(model, folder, monkeypatch, name):
    facts = onnxfile.examine(model)
    made_with = {"runtime": "1.32.0", "device": "cpu"}
    before = graphcache.entry(folder, model, facts, made_with)
    assert graphcache.entry(folder, model, facts, dict(reversed(made_with.items()))) == before
    if name == "cpu":
        monkeypatch.setattr(graphcache, "_cpu_features", lambda: "another")
    else:
        made_with[name] += "0"
    assert graphcache.entry(folder, model, facts, made_with) != before


def test_a_model_with_external_data_has_no_entry_and_loads_from_where_it_is(model, folder, opened):
    """ONNX Runtime's optimised graph would still name the data, relative to its own folder."""
    outside = network()
    convert_model_to_external_data(outside, location="weights.bin", size_threshold=0)
    onnx.save(outside, model)
    first = run(load(model, folder))
    assert run(load(model, folder)) == first
    assert opened == [model, model]
    assert not folder.exists()


def flip_a_bit(path):
    """In the weights: ONNX Runtime would answer wrongly, and say nothing."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def make_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def make_a_link(path):
    """To what would fit."""
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def digest_of(path):
    return path.with_name(f"{path.name}.sha256")


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "nonsense": lambda path: path.write_bytes(b"nonsense" * 1000),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "a flipped bit": flip_a_bit,
    "another graph": lambda path: onnx.save(
        parse("(float[n] q) => (float[n] z) {z = Abs (q)}"), path
    ),
    "a pipe": make_a_pipe,
    "a link": make_a_link,
    "no digest": lambda path: digest_of(path).unlink(),
    "a longer digest": lambda path: digest_of(path).write_text(digest_of(path).read_text() + "0"),
    "no text for a digest": lambda path: digest_of(path).write_bytes(b"\xff" * 64),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_entry_is_replaced_unread_with_a_warning(model, folder, opened, caplog, name):
    first = run(load(model, folder))
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    assert caplog.messages == []
    DAMAGES[name](entry)
    assert run(load(model, folder)) == first
    assert opened[1:] == [model]
    assert caplog.messages == [
        f"the optimised graph {entry.name} is not what was kept there: made again"
    ]
    assert entries(folder) == [entry]
    assert len(entry.read_bytes()) == len(whole)
    assert run(load(model, folder)) == first
    assert opened[2:] == [entry]
    assert len(caplog.messages) == 1


def test_an_entry_that_is_whole_and_refused_is_made_again(model, folder, opened, monkeypatch):
    load(model, folder)
    (entry,) = entries(folder)
    start = session_opening._start

    def refuse(path, *args, **options):
        made = start(path, *args, **options)
        if path == entry:
            raise session_opening.LoadError("not with this runtime")
        return made

    monkeypatch.setattr(session_opening, "_start", refuse)
    assert run(load(model, folder)) == run(load(model, None))
    assert opened == [model, entry, model, model]


def not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "cache"


def not_writable(tmp_path):
    """Not even for root: nothing can be made in it."""
    return "/proc/self/fdinfo"


@pytest.mark.parametrize("make", [not_a_folder, not_writable])
def test_without_a_folder_to_write_to_a_model_loads_all_the_same(model, tmp_path, make):
    place = make(tmp_path)
    assert run(load(model, place)) == run(load(model, None))


def test_an_entry_that_cannot_be_put_in_place_leaves_nothing(model, folder, monkeypatch):
    def refuse(*_args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    assert run(load(model, folder)) == run(load(model, None))
    assert entries(folder) == []


def test_a_model_that_cannot_be_written_down_leaves_nothing(model, folder, monkeypatch, opened):
    """As with a provider that compiles parts of the graph."""
    start = session_opening._start

    def refuse(path, *args, optimized=None, **options):
        if optimized is not None:
            optimized.write_bytes(b"half of it")
            raise session_opening.LoadError("it cannot be serialised")
        return start(path, *args, **options)

    monkeypatch.setattr(session_opening, "_start", refuse)
    assert run(load(model, folder)) == run(load(model, None))
    assert entries(folder) == []


def test_few_entries_of_a_version_are_kept_the_newest(model, folder):
    kept = []
    for i in range(KEPT_ENTRIES + 2):
        load(model, folder, config=(("a.key", str(i)),))
        (new,) = set(entries(folder)) - set(kept)
        os.utime(new, (i, i))  # what a clock would do
        kept.append(new)
    assert entries(folder) == sorted(kept[-KEPT_ENTRIES:])


def keep(folder, name: str, seconds: int) -> None:
    made = folder / f"{name}.made"
    made.write_bytes(b"")
    os.utime(made, (seconds, seconds))
    graphcache.keep(made, folder / name)


def test_other_versions_and_models_keep_their_own(folder):
    """Also one whose name begins like this version's entries."""
    folder.mkdir()
    names = ["m-2", "m-1-1", "m-11", "n-1", "m-1.5-1"]
    others = [f"{stem}-{i:032x}.onnx" for stem in names for i in range(2)]
    for name in others:
        keep(folder, name, 1)
    for i in range(KEPT_ENTRIES + 3):
        keep(folder, f"m-1-{i:032x}.onnx", 10 + i)
    mine = [f"m-1-{i:032x}.onnx" for i in range(3, KEPT_ENTRIES + 3)]
    assert [path.name for path in entries(folder)] == sorted(others + mine)


@pytest.mark.parametrize(
    ("nbytes", "is_worth_it"),
    [
        (SMALLEST_CACHED_BYTES - 1, False),
        (SMALLEST_CACHED_BYTES, True),
        (graphcache.LARGEST_CACHED_BYTES, True),
        (graphcache.LARGEST_CACHED_BYTES + 1, False),
    ],
)
def test_small_and_huge_models_are_not_kept(model, folder, nbytes, is_worth_it):
    facts = replace(onnxfile.examine(model), file_bytes=nbytes)
    entry = graphcache.entry(folder, model, facts, {})
    assert (entry is not None) == is_worth_it
    if is_worth_it:
        assert entry.parent == folder
        assert entry.name.startswith("m-1-")


@pytest.mark.parametrize("options", [{"graph_optimization": "disabled"}])
def test_what_is_not_optimised_is_not_kept(model, folder, options):
    load(model, folder, **options)
    assert not folder.exists()


def test_a_copy_of_the_repository_elsewhere_uses_the_same_entries(model, folder, opened, tmp_path):
    load(model, folder)
    shutil.copytree(tmp_path / "repository", tmp_path / "copy")
    load(tmp_path / "copy" / "m" / "1" / "model.onnx", folder)
    assert opened == [model, *entries(folder)]
