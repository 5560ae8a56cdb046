"""The models of `benchmarks/models.py` are valid, compute what they say, and work row by row."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'inference-gateway[dev]'")
onnxruntime = pytest.importorskip(
    "onnxruntime", reason="needs ONNX Runtime: pip install 'inference-gateway[cpu]'"
)

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "models.py"
NAMES = ("mlp16", "mlp784", "encoder", "image", "echo", "gather", "dynamic", "multi", "slow")
BATCHES = (1, 2, 7)


@pytest.fixture(scope="module")
def models():
    spec = importlib.util.spec_from_file_location("benchmark_models", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models.write_repository(folder)
    return folder


def open_session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # the errors that a test provokes are no news
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def session(repository, name):
    return open_session(repository / name / "1" / "model.onnx")


def example(name, batch):
    """Makes inputs of `batch` rows for a model."""
    rng = np.random.default_rng(batch)
    if name == "gather":
        return {"index": rng.integers(-100, 100, batch)}
    if name == "multi":
        return {
            "in_fp32": rng.standard_normal((batch, 4), np.float32),
            "in_fp16": rng.standard_normal((batch, 4)).astype(np.float16),
            "in_fp64": rng.standard_normal((batch, 2)),
            "in_int64": rng.integers(-(2**62), 2**62, (batch, 2)),
            "in_bool": rng.integers(0, 2, (batch, 2)).astype(bool),
            "in_uint8": rng.integers(0, 256, (batch, 3), np.uint8),
            "in_int8": rng.integers(-128, 128, (batch, 3), np.int8),
        }
    key, row_shape = {
        "mlp16": ("x", (16,)),
        "mlp784": ("x", (784,)),
        "encoder": ("tokens_embedding", (32, 384)),
        "image": ("x", (3, 224, 224)),
        "echo": ("x", (16,)),
        "dynamic": ("x", (5,)),
        "slow": ("x", (4,)),
    }[name]
    return {key: rng.standard_normal((batch, *row_shape), np.float32)}


def run(session, inputs):
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def weights_of(path):
    """Returns a model's constants in the order in which they were added."""
    return [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]


def mlp(path, x):
    """Computes a chain of dense layers with ReLU between them, in float64."""
    constants = weights_of(path)
    layers = list(zip(constants[::2], constants[1::2], strict=True))
    for index, (weight, bias) in enumerate(layers):
        x = x @ weight.astype(np.float64) + bias
        if index < len(layers) - 1:
            x = np.maximum(x, 0)
    return x


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def erf(x):
    """Approximates the error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26)."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    powers = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
    series = sum(factor * t ** (n + 1) for n, factor in enumerate(powers))
    return np.sign(x) * (1 - series * np.exp(-(x**2)))


def encoder(path, x):
    """Computes the encoder in float64, taking its constants in the order in which they were added.

    That order is the module's own, so this also fails when a constant is used out of place.
    """
    constants = iter(weights_of(path))

    def dense(x):
        return x @ next(constants).astype(np.float64) + next(constants)

    def normalized(x):
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
        return centred / deviation * next(constants) + next(constants)

    n = len(x)
    for _ in range(6):
        split, joined = next(constants), next(constants)
        query, key, value = (
            dense(x).reshape(n, *split[1:]).transpose(0, 2, 1, 3) for _ in range(3)
        )
        scores = query @ key.transpose(0, 1, 3, 2) * next(constants)
        mixed = (softmax(scores) @ value).transpose(0, 2, 1, 3).reshape(n, *joined[1:])
        x = normalized(x + dense(mixed))
        inner = dense(x)
        half, one, scale = next(constants), next(constants), next(constants)
        inner = inner * (1 + erf(inner * half)) / 2
        assert (one, scale) == (1, 0.5)
        x = normalized(x + dense(inner))
    assert next(constants, None) is None
    return x


def expected(name, inputs, path):
    """Computes in NumPy what a model should answer."""
    first = next(iter(inputs.values()))
    match name:
        case "mlp16":
            return {"y": mlp(path, first)}
        case "mlp784":
            return {"y": softmax(mlp(path, first))}
        case "encoder":
            return {"hidden": encoder(path, first)}
        case "image":
            return {"y": mlp(path, first.mean(axis=(2, 3), dtype=np.float64))}
        case "echo":
            return {"y": 2 * first + 1, "row_sum": first.sum(axis=1)}
        case "gather":
            return {"y": (first % 100)[:, None] + np.arange(4) / 4}
        case "dynamic":
            return {"y": 3 * first, "mean": first.mean(axis=1, keepdims=True)}
        case "slow":
            return {"y": first + 1}
        case "multi":
            return {
                "out_fp32": inputs["in_fp32"] * 2,
                "out_fp16": inputs["in_fp16"] * 2,
                "out_fp64": inputs["in_fp64"] / 2,
                "out_int64": inputs["in_int64"] + 1,
                "out_bool": ~inputs["in_bool"],
                "out_uint8": ~inputs["in_uint8"],
                "out_int8": ~inputs["in_int8"],
            }
    raise AssertionError(name)


def test_the_names_are_those_of_the_module(models, repository):
    assert tuple(models.MODELS) == NAMES
    assert {path.name for path in repository.iterdir()} == set(NAMES)


def test_the_model_is_valid_and_batched(repository, models, name):
    model = onnx.load(repository / name / "1" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    config = (repository / name / "config.yaml").read_text()
    assert config == f"max_batch_size: {models.MODELS[name][1]}\n"


@pytest.mark.parametrize("batch", BATCHES)
def test_the_answer_is_what_numpy_computes(repository, session, name, batch):
    inputs = example(name, batch)
    wanted = expected(name, inputs, repository / name / "1" / "model.onnx")
    answers = run(session, inputs)
    assert answers.keys() == wanted.keys()
    for output in session.get_outputs():
        answer, value = answers[output.name], wanted[output.name]
        assert answer.shape == value.shape
        assert len(output.shape) == answer.ndim
        if answer.dtype.kind == "f":
            np.testing.assert_allclose(answer, value, rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_array_equal(answer, value)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_row_is_answered_the_same_alone(session, name, batch):
    inputs = example(name, batch)
    together = run(session, inputs)
    for row in range(batch):
        alone = run(session, {key: value[row : row + 1] for key, value in inputs.items()})
        for key, value in alone.items():
            assert value.dtype == together[key].dtype
            np.testing.assert_allclose(value[0], together[key][row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [100, -101, 2**62])
@pytest.mark.parametrize("position", range(3))
def test_one_bad_index_fails_the_whole_batch(repository, bad, position):
    session = open_session(repository / "gather" / "1" / "model.onnx")
    index = np.array([1, 2, 3])
    index[position] = bad
    with pytest.raises(Exception, match="out of data bounds"):
        session.run(None, {"index": index})
    (answer,) = session.run(None, {"index": np.array([3])})
    np.testing.assert_array_equal(answer, [[3, 3.25, 3.5, 3.75]])


def test_the_slow_model_keeps_its_loop_through_optimisation(repository, tmp_path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    path = repository / "slow" / "1" / "model.onnx"
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx").graph
    assert "Loop" in {node.op_type for node in optimised.node}


def test_files_are_the_same_every_time(models, repository, tmp_path):
    for name in set(NAMES) - {"encoder"}:
        models.write_repository(tmp_path, [name])
        again = (tmp_path / name / "1" / "model.onnx").read_bytes()
        assert again == (repository / name / "1" / "model.onnx").read_bytes(), name


def test_the_command_line_writes_what_it_is_asked_for(models, tmp_path, capsys):
    assert models.main([str(tmp_path), "echo"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["echo"]
    assert capsys.readouterr().out.startswith("echo: ")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["somewhere", "nonesuch"]])
def test_a_wrong_command_line_is_answered_with_the_usage(models, capsys, arguments):
    assert models.main(arguments) == 2
    assert "usage" in capsys.readouterr().err
