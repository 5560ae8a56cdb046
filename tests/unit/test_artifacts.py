"""Model files on their way into the repository, and what is kept out of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from gateway.control import artifacts
from gateway.errors import Conflict, Forbidden, InvalidRequest, Unavailable


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


def test_a_source_is_beneath_a_root(root, repository):
    roots = (repository, root)
    assert artifacts.resolve_source("run/model.onnx", roots) == root / "run" / "model.onnx"
    assert artifacts.resolve_source(str(root / "run"), roots) == root / "run"


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../..", "out/passwd", "run/../../repository", "."]
)
def test_nothing_else_is(root, path):
    with pytest.raises((Forbidden, InvalidRequest)):
        artifacts.resolve_source(path, (root,))


@pytest.mark.parametrize("path", ["", "a\0b", "absent", "x" * 5000])
def test_what_is_no_path_is_refused(root, path):
    with pytest.raises(InvalidRequest):
        artifacts.resolve_source(path, (root,))


def test_a_version_is_made_of_a_file(repository, root):
    artifacts.place(repository, "m", 1, root / "run" / "model.onnx", is_move=False)
    assert files(repository) == {"m/1/model.onnx": b"model"}
    assert (root / "run" / "model.onnx").exists()


def test_or_of_a_folder_but_for_links(repository, root):
    (root / "run" / "passwd").symlink_to("/etc/passwd")
    artifacts.place(repository, "m", 1, root / "run", is_move=False)
    assert files(repository) == {"m/1/model.onnx": b"model", "m/1/weights.bin": b"weights"}


def test_an_upload_is_moved(repository):
    draft = artifacts.drafts_folder(repository) / "upload"
    draft.write_bytes(b"model")
    artifacts.place(repository, "m", 7, draft, is_move=True)
    assert files(repository) == {"m/7/model.onnx": b"model"}


def test_a_version_is_never_replaced(repository, root):
    artifacts.place(repository, "m", 1, root / "run", is_move=False)
    (root / "run" / "model.onnx").write_bytes(b"other")
    with pytest.raises(Conflict, match="has a version 1 already"):
        artifacts.place(repository, "m", 1, root / "run", is_move=False)
    assert files(repository)["m/1/model.onnx"] == b"model"
    assert not list(artifacts.drafts_folder(repository).iterdir())


def test_where_nothing_can_be_written_it_says_so(repository, root, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts.shutil, "copyfile", full)
    with pytest.raises(Unavailable, match="No space left"):
        artifacts.place(repository, "m", 1, root / "run" / "model.onnx", is_move=False)
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
        artifacts.place(repository, "m", version, root / "run", is_move=False)
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
