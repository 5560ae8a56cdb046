"""Model files on their way into the repository, and what is kept out of it."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from gateway.control import artifacts
from gateway.control.artifacts import Allowance
from gateway.errors import Conflict, Forbidden, InvalidRequest, TooLarge, Unavailable

MAX_BYTES = 1 << 20


@pytest.fixture
def repository(tmp_path) -> Path:
    (tmp_path / "repository").mkdir()
    return tmp_path / "repository"


@pytest.fixture
def root(tmp_path) -> Path:
    made = tmp_path / "root"
    (made / "run").mkdir(parents=True)
    (made / "run" / "model.onnx").write_bytes(b"model")
    (made / "run" / "weights.bin").write_bytes(b"weights")
    (made / "out").symlink_to("/etc")
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)
    expected = hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert artifacts.digest_of(tmp_path / "f") == (expected, 3_000_000)


def resolve(path: str, repository: Path, *roots: Path, key: str | None = None) -> Path:
    """Where a path leads for a key that is for one model, or for all."""
    return artifacts.resolve_source(path, repository, roots, lambda model: key in (None, model))


def place(repository: Path, version: int, source: Path, is_move=False, max_bytes=MAX_BYTES):
    artifacts.place(repository, "m", version, source, Allowance(max_bytes), is_move=is_move)


def test_a_source_is_beneath_a_root(root, repository):
    assert resolve("run/model.onnx", repository, root) == root / "run" / "model.onnx"
    assert resolve(str(root / "run"), repository, root) == root / "run"


@pytest.mark.parametrize("path", ["/etc/passwd", "../..", "out/passwd", "run/../../root", "."])
def test_nothing_else_is(root, repository, path):
    with pytest.raises(Forbidden):
        resolve(path, repository, root)


@pytest.mark.parametrize("path", ["", "a\0b", "absent", "x" * 5000])
def test_what_is_no_path_is_refused(root, repository, path):
    with pytest.raises(InvalidRequest):
        resolve(path, repository, root)


@pytest.fixture
def models(repository) -> Path:
    """The repository, with the models ``mine`` and ``other``, and a link from one to the other."""
    for name in ("mine", "other"):
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "1" / "model.onnx").write_bytes(name.encode())
    (repository / "mine" / "2").symlink_to(repository / "other" / "1")
    artifacts.drafts_folder(repository)
    return repository


def test_a_key_for_one_model_reads_that_one_of_the_repository(models):
    assert resolve("mine/1", models, key="mine") == models / "mine" / "1"
    assert resolve("other/1", models) == models / "other" / "1"
    paths = ("other/1/model.onnx", "other", "mine/../other/1", "mine/2", "other/9", "nothing")
    for path in (*paths, str(models / "other" / "1")):
        with pytest.raises(Forbidden):
            resolve(path, models, key="mine")


def test_and_everything_in_the_roots_but_the_repository_itself(models, root, tmp_path):
    assert resolve("run", models, root, key="mine") == root / "run"
    within = tmp_path.parent  # around the repository
    assert resolve(str(root / "run"), models, within, key="mine") == root / "run"
    for hidden in (models / "other" / "1", models, tmp_path):
        with pytest.raises(Forbidden):
            resolve(str(hidden), models, within, key="mine")


def test_the_state_of_the_server_is_no_source(models, tmp_path):
    for roots in ((), (tmp_path,)):
        with pytest.raises(Forbidden):
            resolve(str(models / ".gateway" / "uploads"), models, *roots)


def test_a_version_is_made_of_a_file(repository, root):
    place(repository, 1, root / "run" / "model.onnx")
    assert files(repository) == {"m/1/model.onnx": b"model"}
    assert (root / "run" / "model.onnx").exists()


def test_or_of_a_folder_but_for_links_and_what_is_no_file(repository, root, monkeypatch):
    monkeypatch.chdir(root / "run")  # a socket's path is short
    Path("passwd").symlink_to("/etc/passwd")
    Path("deep").mkdir()
    Path("deep/more.bin").write_bytes(b"more")
    os.mkfifo("deep/pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
        place(repository, 1, root / "run")
    expected = {"model.onnx": b"model", "weights.bin": b"weights", "deep/more.bin": b"more"}
    assert files(repository) == {f"m/1/{name}": content for name, content in expected.items()}
    assert {path.name for path in (repository / "m" / "1").rglob("*")} == {
        *(Path(name).name for name in expected),
        "deep",
    }


@pytest.mark.parametrize("source", ["run", "run/model.onnx"])
def test_a_source_has_at_most_the_bytes_that_it_may(repository, root, source):
    nbytes = 12 if source == "run" else 5
    with pytest.raises(TooLarge, match="max_artifact_bytes"):
        place(repository, 1, root / source, max_bytes=nbytes - 1)
    assert files(repository) == {}
    place(repository, 1, root / source, max_bytes=nbytes)


def test_a_file_that_grows_without_end_is_not_read_for_ever(repository, root, monkeypatch):
    file = root / "run" / "model.onnx"
    take = Allowance.take

    def grow(allowance: Allowance, nbytes: int) -> None:
        take(allowance, nbytes)
        with file.open("ab") as more:
            more.write(b"x" * nbytes)

    monkeypatch.setattr(Allowance, "take", grow)
    with pytest.raises(TooLarge):
        artifacts.digest_of(file, Allowance(MAX_BYTES))
    with pytest.raises(TooLarge):
        place(repository, 1, file)
    assert files(repository) == {}


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_was_a_file_a_moment_ago_is_not_copied(repository, root, kind):
    (os.mkfifo if kind == "pipe" else lambda path: path.symlink_to("/etc/passwd"))(root / kind)
    with pytest.raises(Unavailable):
        place(repository, 1, root / kind)
    assert files(repository) == {}


def test_settings_are_copied_within_the_bytes_that_there_may_be(repository, root):
    (root / "run" / "config.yaml").write_text("promote: manual\n")
    with pytest.raises(TooLarge):
        artifacts.place_settings(repository, "m", root / "run", Allowance(15))
    artifacts.place_settings(repository, "m", root / "run", Allowance(16))
    assert files(repository) == {"m/config.yaml": b"promote: manual\n"}


def test_an_upload_is_moved(repository):
    draft = artifacts.drafts_folder(repository) / "upload"
    draft.write_bytes(b"model")
    place(repository, 7, draft, is_move=True)
    assert files(repository) == {"m/7/model.onnx": b"model"}


def test_a_version_is_never_replaced(repository, root):
    place(repository, 1, root / "run")
    (root / "run" / "model.onnx").write_bytes(b"other")
    with pytest.raises(Conflict, match="has a version 1 already"):
        place(repository, 1, root / "run")
    assert files(repository)["m/1/model.onnx"] == b"model"
    assert not list(artifacts.drafts_folder(repository).iterdir())


def test_where_nothing_can_be_written_it_says_so(repository, root, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Allowance, "take", full)
    for source in (root / "run" / "model.onnx", root / "run"):
        with pytest.raises(Unavailable, match="No space left"):
            place(repository, 1, source)
    assert files(repository) == {}


@pytest.mark.parametrize("name", ["link", "empty", "pipe"])
def test_only_a_real_file_is_a_model(tmp_path, name):
    (tmp_path / "real").write_bytes(b"")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidRequest):
        artifacts.model_file(tmp_path / name)


def test_what_is_removed_is_gone(repository, root):
    for version in (1, 2):
        place(repository, version, root / "run")
    artifacts.remove_version(repository, "m", 1)
    assert set(files(repository)) == {"m/2/model.onnx", "m/2/weights.bin"}
    artifacts.remove_version(repository, "m", 1)
    artifacts.remove_model(repository, "m")
    assert files(repository) == {}


def test_a_link_is_removed_and_not_what_it_leads_to(repository, root):
    (repository / "m").mkdir()
    (repository / "m" / "1").symlink_to(root / "run")
    artifacts.remove_version(repository, "m", 1)
    assert not (repository / "m" / "1").exists()
    assert (root / "run" / "model.onnx").exists()
