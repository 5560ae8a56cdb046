"""The bundled `digits` models answer as well, or as badly, as their table says."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
onnxruntime = pytest.importorskip(
    "onnxruntime", reason="needs ONNX Runtime: pip install 'inference-gateway[cpu]'"
)

FOLDER = Path(__file__).parents[2] / "examples" / "digits"
ACCURACY = json.loads((FOLDER / "accuracy.json").read_text())
VERSIONS = ("1", "2", "3")


def model_path(version):
    return FOLDER / "models" / "digits" / version / "model.onnx"


@pytest.fixture(scope="module")
def held_out():
    with np.load(FOLDER / "held_out.npz", allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"]


@pytest.fixture(scope="module", params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def session(version):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model_path(version), options, providers=["CPUExecutionProvider"]
    )


def test_held_out_images_are_raw_pixels(held_out):
    images, labels = held_out
    assert (images.dtype, images.shape[1:]) == (np.uint8, (8, 8))
    assert (images.min(), images.max()) == (0, 16)
    assert labels.shape == (len(images),)
    assert set(labels.tolist()) == set(range(10))


def test_the_table_names_exactly_the_versions_there_are():
    folders = {path.parent.name for path in FOLDER.glob("models/digits/*/model.onnx")}
    assert folders == set(ACCURACY) == set(VERSIONS)


def test_signature(session):
    (image,) = session.get_inputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", ["batch", 8, 8])
    assert [(out.name, out.type, out.shape) for out in session.get_outputs()] == [
        ("probabilities", "tensor(float)", ["batch", 10]),
        ("label", "tensor(int64)", ["batch"]),
    ]


def test_the_model_says_what_it_is(session, version):
    meta = session.get_modelmeta()
    assert meta.version == int(version)
    assert meta.description == meta.custom_metadata_map["description"]
    assert ("BROKEN" in meta.description) == (version == "3")


def test_accuracy_is_what_the_table_says(session, version, held_out):
    images, labels = held_out
    probabilities, answers = session.run(None, {"image": images.astype(np.float32)})

    np.testing.assert_array_equal(answers, probabilities.argmax(axis=1))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    row = ACCURACY[version]
    assert row["total"] == len(labels)
    assert row["correct"] == int((answers == labels).sum())
    assert row["accuracy"] == pytest.approx(row["correct"] / row["total"], abs=1e-4)


def test_a_row_is_answered_the_same_alone(session, held_out):
    images = held_out[0][:7].astype(np.float32)
    together, _ = session.run(None, {"image": images})
    for row in range(len(images)):
        alone, _ = session.run(None, {"image": images[row : row + 1]})
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-4, atol=1e-6)


def test_version_2_is_better_than_1_and_3_clearly_worse():
    share = {version: row["accuracy"] for version, row in ACCURACY.items()}
    assert share["1"] >= 0.95
    assert share["2"] >= 0.99
    assert share["2"] > share["1"]
    assert share["3"] < 0.5


def test_the_page_shows_the_same_numbers():
    page = (FOLDER / "ACCURACY.md").read_text()
    readme = (FOLDER / "README.md").read_text()
    for version, row in ACCURACY.items():
        share = f"{100 * row['correct'] / row['total']:.2f} %"
        assert f"| {version} | {row['correct']} | {row['total']} | {share} |" in page
        assert f"{share} ({row['correct']} of {row['total']})" in readme


def test_files_are_small(version):
    assert model_path(version).stat().st_size < 100_000
