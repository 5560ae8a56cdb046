"""The model repository: which folders are models and versions, and which of them are served."""

import logging
import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.control import repository as repository_module
from gateway.control.repository import (
    ModelEntry,
    VersionEntry,
    choose,
    is_model_name,
    parse_version,
    routed_version,
    scan,
    scan_model,
)
from gateway.errors import ConfigurationError, NotFound, Unavailable
from gateway.names import MAX_VERSION
from gateway.settings import Latest, ModelSettings, Specific

NAMELESS = (
    "",
    ".",
    "..",
    "_a",
    "-a",
    ".a",
    "a b",
    "a/b",
    "a\\b",
    "a\n",
    "\n",
    "a\0",
    "é",
    "a" * 65,
)


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.DEBUG)
    return caplog


def add(repository, model, *versions, config=None):
    """Makes a model with these version folders; nobody here opens the file in them."""
    folder = repository / model
    folder.mkdir(exist_ok=True)
    for version in versions:
        (folder / str(version)).mkdir()
        (folder / str(version) / "model.onnx").write_bytes(b"not looked at")
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def scan_one(repository):
    (entry,) = scan(repository)
    return entry


def numbers(versions):
    return [entry.version for entry in versions]


def refusal(call, *args):
    with pytest.raises(ConfigurationError) as caught:
        call(*args)
    assert caught.value.message.isprintable()
    return caught.value.message


# ---- reading -------------------------------------------------------------------------------------


def test_models_by_name_and_versions_by_number(repository, log):
    add(repository, "digits", 10, 9, 1)
    add(repository, "animals", 2, config="promote: manual")
    animals, digits = scan(repository)
    assert animals == ModelEntry(
        "animals",
        ModelSettings(promote="manual"),
        (VersionEntry(2, repository / "animals" / "2" / "model.onnx"),),
        [],
    )
    assert (digits.name, digits.settings) == ("digits", ModelSettings())
    assert numbers(digits.versions) == [1, 9, 10]
    assert log.messages == []


def test_an_empty_repository(repository):
    assert scan(repository) == []


def test_paths_are_absolute(repository, monkeypatch):
    add(repository, "digits", 1)
    monkeypatch.chdir(repository.parent)
    (version,) = scan_one(Path("models")).versions
    assert version.path.is_absolute()
    assert version.path.is_file()


def test_files_and_hidden_folders_are_passed_over_in_silence(repository, log):
    model = add(repository, "digits", 1)
    (repository / "README.md").touch()
    (repository / "ODD NAME.txt").touch()
    for hidden in (repository / ".gateway", repository / ".git", model / ".cache"):
        hidden.mkdir()
    for beside in ("config.pbtxt", "labels.txt", ".DS_Store"):
        (model / beside).touch()
    os.symlink("labels.txt", model / "classes.txt")
    assert scan_one(repository).ignored == []
    assert log.messages == []


@pytest.mark.parametrize("name", ["a b", "-a", "_a", "é", "lost+found", "a" * 65])
def test_a_folder_that_is_no_model_name(repository, log, name):
    add(repository, name, 1)
    assert scan(repository) == []
    assert log.messages == [f"model repository: ignored {name!a}: not a model name"]


def test_names_cannot_forge_log_lines(repository, log):
    for name in (b"a\nINFO all is well", b"a\x1b[2Jb", "a\u202eb\u2028c".encode(), b"a\xff"):
        os.mkdir(os.fsencode(repository) + b"/" + name)
    add(repository, "digits", "1\n2")
    scan(repository)
    assert len(log.messages) == 6
    for message in log.messages:
        assert message.isascii()
        assert message.isprintable()


@pytest.mark.parametrize("name", ["01", "abc", "0", "-1", "+1", "1.0", "1 ", "1_0", "١", "1" * 20])
def test_a_folder_that_is_no_version(repository, log, name):
    add(repository, "digits", 1, name)
    entry = scan_one(repository)
    assert numbers(entry.versions) == [1]
    assert entry.ignored == [
        f"version folder {name!a}: not a version: 1 to {MAX_VERSION}, without leading zeros"
    ]
    assert log.messages == [f"model 'digits': ignored {entry.ignored[0]}"]


def test_versions_up_to_int64(repository):
    add(repository, "digits", MAX_VERSION, MAX_VERSION + 1)
    entry = scan_one(repository)
    assert numbers(entry.versions) == [MAX_VERSION]
    assert len(entry.ignored) == 1


def test_versions_without_a_model_file(repository, log):
    model = add(repository, "digits")
    (model / "1").mkdir()
    (model / "2" / "model.onnx").mkdir(parents=True)
    (model / "3").touch()
    (model / "4").mkdir()
    os.mkfifo(model / "4" / "model.onnx")
    entry = scan_one(repository)
    assert entry.versions == ()
    assert entry.ignored == [
        "version folder '1': 'model.onnx' does not exist",
        "version folder '2': 'model.onnx' is not a file",
        "version folder '3': 'model.onnx' cannot be read: Not a directory",
        "version folder '4': 'model.onnx' is not a file",
    ]
    assert log.messages[-1] == "model 'digits': has no usable version"


def test_a_model_without_versions_is_reported(repository, log):
    add(repository, "digits")
    assert scan_one(repository).versions == ()
    assert log.messages == ["model 'digits': has no usable version"]


def test_a_pipe_is_no_model(repository, log):
    os.mkfifo(repository / "digits")
    assert scan(repository) == []
    assert log.messages == ["model repository: ignored 'digits': not a folder"]


def test_a_model_folder_that_cannot_be_listed(repository, log, monkeypatch):
    # Tests may run as root, whom permissions do not stop.
    model = add(repository, "digits", 1)
    listed = repository_module._visible

    def visible(folder):
        if folder == model:
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(repository_module, "_visible", visible)
    entry = scan_one(repository)
    assert entry.versions == ()
    assert entry.ignored == ["all versions: cannot be read: Permission denied"]


# ---- links ---------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path):
    """A folder beside the repository whose name begins like the repository's."""
    return add(tmp_path, "models-private", 1, config="promote: manual")


def test_links_inside_the_repository_are_followed(repository):
    model = add(repository, "digits", 1)
    store = repository / ".store"
    store.mkdir()
    (model / "1" / "model.onnx").rename(store / "blob")
    os.symlink("../../.store/blob", model / "1" / "model.onnx")
    os.symlink("1", model / "2")
    os.symlink("digits", repository / "alias")
    alias, digits = scan(repository)
    assert numbers(digits.versions) == numbers(alias.versions) == [1, 2]
    # As laid out, because external data is named relative to this.
    assert digits.versions[1].path == model / "2" / "model.onnx"


def test_the_repository_itself_may_be_a_link(repository, tmp_path):
    add(repository, "digits", 1)
    os.symlink(repository, tmp_path / "link")
    assert scan(tmp_path / "link") == scan(repository)


def test_a_model_file_that_leads_out(repository, outside, log):
    model = add(repository, "digits", 1)
    for version in "23":
        (model / version).mkdir()
    os.symlink(outside / "1" / "model.onnx", model / "2" / "model.onnx")
    os.symlink("../../../models-private/1/model.onnx", model / "3" / "model.onnx")
    os.symlink(outside / "1", model / "4")
    entry = scan_one(repository)
    assert numbers(entry.versions) == [1]
    assert entry.ignored == [
        f"version folder '{version}': 'model.onnx' leads out of the model repository"
        for version in "234"
    ]
    assert len(log.messages) == 3


def test_a_model_folder_that_leads_out(repository, outside, log):
    os.symlink(outside, repository / "digits")
    assert scan(repository) == []
    assert log.messages == [
        "model repository: ignored 'digits': 'digits' leads out of the model repository"
    ]


def test_settings_that_lead_out(repository, outside):
    model = add(repository, "digits", 1)
    os.symlink(outside / "config.yaml", model / "config.yaml")
    assert refusal(scan, repository) == (
        "config.yaml of model 'digits': 'config.yaml' leads out of the model repository"
    )


def test_links_that_lead_nowhere(repository, log):
    model = add(repository, "digits")
    os.symlink("absent", repository / "lost")
    os.symlink("circle", repository / "circle")
    os.symlink("absent", model / "1")
    (model / "2").mkdir()
    os.symlink("model.onnx", model / "2" / "model.onnx")
    entry = scan_one(repository)
    assert entry.versions == ()
    first, second = entry.ignored
    assert first == "version folder '1': 'model.onnx' does not exist"
    assert second.startswith("version folder '2': 'model.onnx' cannot be read: ")
    assert len(log.messages) == 5


# ---- what ends the start -------------------------------------------------------------------------


def test_a_repository_that_is_not_there(tmp_path):
    path = tmp_path / "absent"
    assert refusal(scan, path) == (
        f"model_repository: '{path}' cannot be read: No such file or directory"
    )


def test_a_repository_that_is_a_file(tmp_path):
    path = tmp_path / "model.onnx"
    path.touch()
    assert refusal(scan, path) == f"model_repository: '{path}' cannot be read: Not a directory"


def test_a_repository_that_cannot_be_listed(repository, monkeypatch):
    def visible(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(repository_module, "_visible", visible)
    assert refusal(scan, repository).endswith("cannot be read: Permission denied")


@pytest.mark.parametrize("name", ["a\0b", "\udc00\ud800", "a\nb", "x" * 300])
def test_a_repository_with_an_impossible_name(name):
    assert refusal(scan, Path(name)).startswith(f"model_repository: {name!r} cannot be read: ")


def test_a_repository_in_a_circle_of_links(tmp_path):
    os.symlink("circle", tmp_path / "circle")
    assert "cannot be read: " in refusal(scan, tmp_path / "circle")


def test_wrong_settings_name_the_model(repository):
    add(repository, "digits", 1, config="max_batchsize: 3")
    assert refusal(scan, repository) == (
        "config.yaml of model 'digits': unknown key 'max_batchsize' "
        "(did you mean 'max_batch_size'?)"
    )


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("absent", path)])
def test_settings_that_are_no_file_are_not_taken_for_absent(repository, make):
    model = add(repository, "digits", 1)
    make(model / "config.yaml")
    assert refusal(scan, repository).startswith("config.yaml of model 'digits': 'config.yaml' ")


# ---- names ---------------------------------------------------------------------------------------


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True))
def test_model_names(name):
    assert is_model_name(name)
    assert Path(name).name == name


@given(st.text())
@example("a\n")
def test_what_is_no_model_name(name):
    legal = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
    assert is_model_name(name) == (
        0 < len(name) <= 64 and set(name) <= legal and name[0] not in "_.-"
    )


@pytest.mark.parametrize("name", NAMELESS)
def test_names_that_hurt_others(name):
    assert not is_model_name(name)
    assert parse_version(name) is None


@given(st.integers())
@example(0)
@example(MAX_VERSION)
@example(MAX_VERSION + 1)
def test_versions_are_canonical(number):
    assert parse_version(str(number)) == (number if 1 <= number <= MAX_VERSION else None)


@given(st.one_of(st.text(), st.from_regex(r"[+-]?[0-9_]{1,20}\s?", fullmatch=True)))
@example("01")
@example("1\n")
@example("٣")
@example("²")
@example("9" * 5000)
def test_a_version_has_one_spelling(name):
    version = parse_version(name)
    assert version is None or (str(version) == name and 1 <= version <= MAX_VERSION)
    assert version is not None or not re.fullmatch(r"[1-9][0-9]{0,17}", name, re.ASCII)


# ---- choosing ------------------------------------------------------------------------------------


def entry_of(versions, policy):
    return ModelEntry(
        "digits",
        ModelSettings(version_policy=policy),
        tuple(VersionEntry(version, Path(str(version))) for version in versions),
        [],
    )


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        (Latest(latest=1), [9]),
        (Latest(latest=2), [3, 9]),
        (Latest(latest=3), [1, 3, 9]),
        (Latest(latest=MAX_VERSION), [1, 3, 9]),
        (Specific(specific=(3,)), [3]),
        (Specific(specific=(9, 1, 9)), [1, 9]),
        ("all", [1, 3, 9]),
    ],
)
def test_the_policy_chooses(policy, chosen):
    assert numbers(choose(entry_of((1, 3, 9), policy))) == chosen


@pytest.mark.parametrize("policy", [Latest(latest=1), "all"])
def test_nothing_to_choose_from(policy):
    assert choose(entry_of((), policy)) == ()


def test_a_specific_version_that_is_absent():
    assert refusal(choose, entry_of((1, 3), Specific(specific=(1, 8, 7)))) == (
        "config.yaml of model 'digits': version_policy.specific: "
        "the repository has no usable version 7"
    )


@given(st.sets(st.integers(1, MAX_VERSION), max_size=20), st.integers(1, MAX_VERSION))
def test_latest_means_the_highest(versions, count):
    chosen = numbers(choose(entry_of(sorted(versions), Latest(latest=count))))
    assert chosen == sorted(versions)[-count:]
    assert len(chosen) == min(count, len(versions))


@given(st.sets(st.integers(1, MAX_VERSION), min_size=1))
def test_the_default_route(versions):
    assert routed_version(versions, "latest") == max(versions)
    assert routed_version(versions, "manual") == min(versions)


def test_there_is_no_route_to_nothing():
    with pytest.raises(ValueError, match="empty"):
        routed_version((), "latest")


# One model alone


def test_one_model_is_read_as_it_is_now(repository):
    folder = add(repository, "m", 1, config="promote: manual\n")
    add(repository, "broken", 1, config="no_such_key: 1\n")  # is another's affair
    assert scan_model(repository, "m") == next(m for m in scan_without(repository, "broken"))
    add(repository, "m", 2)
    (folder / "config.yaml").unlink()
    entry = scan_model(repository, "m")
    assert numbers(entry.versions) == [1, 2]
    assert entry.settings == ModelSettings()


def scan_without(repository, name):
    (repository / name).rename(repository.parent / name)
    return scan(repository)


@pytest.mark.parametrize("name", ["nobody", *NAMELESS])
def test_one_model_that_is_not_there(repository, name):
    add(repository, "m", 1)
    with pytest.raises(NotFound) as caught:
        scan_model(repository, name)
    assert str(caught.value) == ("unknown model 'nobody'" if name == "nobody" else "unknown model")


@pytest.mark.parametrize("kind", ["file", "link", "settings"])
def test_one_model_that_is_none(repository, tmp_path, kind):
    if kind == "file":
        (repository / "m").write_text("")
    elif kind == "link":
        (tmp_path / "outside").mkdir()
        (repository / "m").symlink_to(tmp_path / "outside")
    else:
        add(repository, "m", 1, config="no_such_key: 1\n")
    message = refusal(scan_model, repository, "m")
    assert "model 'm'" in message
    assert str(tmp_path) not in message


def test_one_model_of_a_repository_that_is_gone(tmp_path):
    with pytest.raises(Unavailable, match="the model repository cannot be read"):
        scan_model(tmp_path / "gone", "m")
