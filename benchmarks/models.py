"""Models for benchmarks and tests: small ONNX graphs, deterministic to the byte.

    python benchmarks/models.py OUTDIR          # a model repository with all of them
    python benchmarks/models.py OUTDIR echo     # only some

Each function named after a model writes that model to a path. Most are made so that an answer can be
checked by arithmetic; the dense ones have random weights, drawn from a fixed seed, because a benchmark
asks how long a model takes and not what it knows. Nothing here needs ONNX Runtime.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SEED = 20_240_229
OPSET = 17
IR_VERSION = 8  # the one that came with opset 17: older runtimes load it too

ECHO_WIDTH = 16
GATHER_ROWS = 100
ENCODER_LAYERS = 6
ENCODER_WIDTH = 384
ENCODER_HEADS = 6
ENCODER_HIDDEN = 1536
ENCODER_LENGTH = 32
IMAGE_SHAPE = (3, 224, 224)
SLOW_WIDTH = 128
SLOW_STEPS = 12_000

Shape = Sequence[int | str]


class GraphWriter:
    """Collects nodes, constants, inputs and outputs, then checks and writes the model.

    Every tensor's first dim is the batch, named "batch".
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.rng = np.random.default_rng(SEED)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: int, row_shape: Shape = ()) -> str:
        """Declares an input of shape [batch, *row_shape] and returns its name."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, ["batch", *row_shape]))
        return name

    def output(self, name: str, dtype: int, row_shape: Shape = ()) -> None:
        """Declares an output of shape [batch, *row_shape]."""
        self.outputs.append(helper.make_tensor_value_info(name, dtype, ["batch", *row_shape]))

    def constant(self, value: object, dtype: type = np.float32) -> str:
        """Stores an array or number in the file and returns its name."""
        name = f"const_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def random(self, rows: int, columns: int, gain: float = 1.0) -> str:
        """Stores random FP32 weights whose product with unit-variance rows has deviation `gain`."""
        return self.constant(self.rng.standard_normal((rows, columns)) * (gain / np.sqrt(rows)))

    def node(self, op: str, *inputs: str, out: str | None = None, **attributes: object) -> str:
        """Adds a node of one output and returns the output's name."""
        out = out or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [out], **attributes))
        return out

    def dense(self, x: str, rows: int, columns: int, out: str | None = None) -> str:
        """Adds `x @ weights + bias` with random weights, over the last dim of `x`."""
        product = self.node("MatMul", x, self.random(rows, columns))
        bias = self.constant(self.rng.standard_normal(columns) * 0.1)
        return self.node("Add", product, bias, out=out)

    def write(self, path: Path) -> None:
        """Checks the model and writes it to `path`, making folders as needed."""
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.constants)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="inference-gateway benchmarks/models.py",
        )
        onnx.checker.check_model(model, full_check=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model.SerializeToString(deterministic=True))


def mlp16(path: Path) -> None:
    """Writes a model that costs next to nothing: what remains is the gateway's own cost.

    `x` FP32 [batch, 16] -> `y` FP32 [batch, 4]; layers 16-32-32-4 with ReLU.
    """
    g = GraphWriter("mlp16")
    hidden = g.node("Relu", g.dense(g.input("x", TensorProto.FLOAT, [16]), 16, 32))
    hidden = g.node("Relu", g.dense(hidden, 32, 32))
    g.dense(hidden, 32, 4, out="y")
    g.output("y", TensorProto.FLOAT, [4])
    g.write(path)


def mlp784(path: Path) -> None:
    """Writes a classifier of the size of an MNIST one, whose requests are 3 kB each.

    `x` FP32 [batch, 784] -> `y` FP32 [batch, 10], probabilities; layers 784-256-128-10.
    """
    g = GraphWriter("mlp784")
    hidden = g.node("Relu", g.dense(g.input("x", TensorProto.FLOAT, [784]), 784, 256))
    hidden = g.node("Relu", g.dense(hidden, 256, 128))
    g.node("Softmax", g.dense(hidden, 128, 10), out="y", axis=-1)
    g.output("y", TensorProto.FLOAT, [10])
    g.write(path)


def image(path: Path) -> None:
    """Writes a model whose requests are large (602 kB) and that costs little more than reading them.

    `x` FP32 [batch, 3, 224, 224] -> `y` FP32 [batch, 10]: the mean of each channel, then 3-10.
    """
    g = GraphWriter("image")
    means = g.node("GlobalAveragePool", g.input("x", TensorProto.FLOAT, IMAGE_SHAPE))
    g.dense(g.node("Flatten", means, axis=1), IMAGE_SHAPE[0], 10, out="y")
    g.output("y", TensorProto.FLOAT, [10])
    g.write(path)


def _normalized(g: GraphWriter, x: str, out: str | None = None) -> str:
    scale = g.constant(1 + 0.1 * g.rng.standard_normal(ENCODER_WIDTH))
    bias = g.constant(0.1 * g.rng.standard_normal(ENCODER_WIDTH))
    return g.node("LayerNormalization", x, scale, bias, out=out, axis=-1, epsilon=1e-5)


def _attention(g: GraphWriter, x: str) -> str:
    """Adds multi-head self-attention over `x` [batch, length, width], without a mask."""
    head_width = ENCODER_WIDTH // ENCODER_HEADS
    # In a Reshape, 0 keeps the dim that is there and so leaves the batch dynamic.
    split = g.constant([0, ENCODER_LENGTH, ENCODER_HEADS, head_width], np.int64)
    joined = g.constant([0, ENCODER_LENGTH, ENCODER_WIDTH], np.int64)

    def heads(order: list[int]) -> str:
        projected = g.dense(x, ENCODER_WIDTH, ENCODER_WIDTH)
        return g.node("Transpose", g.node("Reshape", projected, split), perm=order)

    query, key, value = heads([0, 2, 1, 3]), heads([0, 2, 3, 1]), heads([0, 2, 1, 3])
    scores = g.node("Mul", g.node("MatMul", query, key), g.constant(head_width**-0.5))
    mixed = g.node("MatMul", g.node("Softmax", scores, axis=-1), value)
    together = g.node("Reshape", g.node("Transpose", mixed, perm=[0, 2, 1, 3]), joined)
    return g.dense(together, ENCODER_WIDTH, ENCODER_WIDTH)


def _gelu(g: GraphWriter, x: str) -> str:
    """Adds the exact GELU, x * (1 + erf(x / sqrt(2))) / 2."""
    erf = g.node("Erf", g.node("Mul", x, g.constant(2**-0.5)))
    return g.node("Mul", g.node("Mul", x, g.node("Add", erf, g.constant(1))), g.constant(0.5))


def encoder(path: Path) -> None:
    """Writes a transformer encoder of the size of a small sentence-embedding model (43 MB).

    `tokens_embedding` FP32 [batch, 32, 384] -> `hidden` FP32 [batch, 32, 384]; 6 layers of 6 heads,
    1,536 wide inside, normalised after each residual as in BERT.
    """
    g = GraphWriter("encoder")
    shape = [ENCODER_LENGTH, ENCODER_WIDTH]
    x = g.input("tokens_embedding", TensorProto.FLOAT, shape)
    for layer in range(ENCODER_LAYERS):
        x = _normalized(g, g.node("Add", x, _attention(g, x)))
        inner = _gelu(g, g.dense(x, ENCODER_WIDTH, ENCODER_HIDDEN))
        widened = g.node("Add", x, g.dense(inner, ENCODER_HIDDEN, ENCODER_WIDTH))
        x = _normalized(g, widened, out="hidden" if layer == ENCODER_LAYERS - 1 else None)
    g.output("hidden", TensorProto.FLOAT, shape)
    g.write(path)


def echo(path: Path) -> None:
    """Writes a model whose answer proves which row it belongs to.

    `x` FP32 [batch, 16] -> `y` FP32 [batch, 16] = 2 * x + 1, `row_sum` FP32 [batch].
    """
    g = GraphWriter("echo")
    x = g.input("x", TensorProto.FLOAT, [ECHO_WIDTH])
    g.node("Add", g.node("Mul", x, g.constant(2)), g.constant(1), out="y")
    g.node("ReduceSum", x, g.constant([1], np.int64), out="row_sum", keepdims=0)
    g.output("y", TensorProto.FLOAT, [ECHO_WIDTH])
    g.output("row_sum", TensorProto.FLOAT)
    g.write(path)


def gather_table() -> np.ndarray:
    """Returns the table of `gather`, FP32 [100, 4]: row i is i, i + 0.25, i + 0.5, i + 0.75."""
    columns = np.arange(4, dtype=np.float32) / 4
    return np.arange(GATHER_ROWS, dtype=np.float32)[:, None] + columns


def gather(path: Path) -> None:
    """Writes a model that one bad row makes fail for the whole batch.

    `index` INT64 [batch] -> `y` FP32 [batch, 4], rows of `gather_table`. An index outside
    -100..99 makes ONNX Runtime's CPU provider raise from `run`.
    """
    g = GraphWriter("gather")
    g.node("Gather", g.constant(gather_table()), g.input("index", TensorProto.INT64), out="y")
    g.output("y", TensorProto.FLOAT, [4])
    g.write(path)


def dynamic(path: Path) -> None:
    """Writes a model with a second dynamic dim, so that requests come in several row shapes.

    `x` FP32 [batch, length] -> `y` FP32 [batch, length] = 3 * x, `mean` FP32 [batch, 1].
    """
    g = GraphWriter("dynamic")
    x = g.input("x", TensorProto.FLOAT, ["length"])
    g.node("Mul", x, g.constant(3), out="y")
    g.node("ReduceMean", x, out="mean", axes=[1], keepdims=1)
    g.output("y", TensorProto.FLOAT, ["length"])
    g.output("mean", TensorProto.FLOAT, [1])
    g.write(path)


def multi(path: Path) -> None:
    """Writes a model of seven inputs and outputs, each of a dtype of its own.

    Every `in_T` [batch, k] -> `out_T` [batch, k]: `fp32` [4] and `fp16` [4] doubled, `fp64` [2]
    halved, `int64` [2] plus one, `bool` [2] negated, `uint8` [3] 255 - x, `int8` [3] -1 - x.
    None of them overflows on any input but `int64` and the floats at their very ends.
    """
    g = GraphWriter("multi")

    def via_int32(name: str, dtype: int, minuend: int) -> None:
        # ONNX Runtime's CPU provider has no Sub for 8-bit integers.
        wide = g.node("Cast", g.input(f"in_{name}", dtype, [3]), to=TensorProto.INT32)
        difference = g.node("Sub", g.constant(minuend, np.int32), wide)
        g.node("Cast", difference, out=f"out_{name}", to=dtype)
        g.output(f"out_{name}", dtype, [3])

    def elementwise(op: str, name: str, dtype: int, width: int, *operands: str) -> None:
        g.node(op, g.input(f"in_{name}", dtype, [width]), *operands, out=f"out_{name}")
        g.output(f"out_{name}", dtype, [width])

    elementwise("Mul", "fp32", TensorProto.FLOAT, 4, g.constant(2))
    elementwise("Mul", "fp16", TensorProto.FLOAT16, 4, g.constant(2, np.float16))
    elementwise("Mul", "fp64", TensorProto.DOUBLE, 2, g.constant(0.5, np.float64))
    elementwise("Add", "int64", TensorProto.INT64, 2, g.constant(1, np.int64))
    elementwise("Not", "bool", TensorProto.BOOL, 2)
    via_int32("uint8", TensorProto.UINT8, 255)
    via_int32("int8", TensorProto.INT8, -1)
    g.write(path)


def slow(path: Path, steps: int = SLOW_STEPS) -> None:
    """Writes a model that computes for 20 to 50 ms, on one thread for 1 to 8 rows, to add one.

    `x` FP32 [batch, 4] -> `y` FP32 [batch, 4] = x + 1, for finite x. A Loop applies
    `h = tanh(h @ weights)` `steps` times to each row; what is added is floor(|h| / 2), which is 0
    because |h| <= 1. An optimiser cannot know that bound, nor fold a loop whose state is an input.

    Args:
        path: the file to write.
        steps: how many times to loop; the time of a run is proportional to it.
    """
    g = GraphWriter("slow")
    x = g.input("x", TensorProto.FLOAT, [4])
    start = g.node("MatMul", x, g.random(4, SLOW_WIDTH))
    # A gain above 1 keeps h from fading into denormal numbers, which would be slower still.
    weights = g.random(SLOW_WIDTH, SLOW_WIDTH, gain=1.5)
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["h_in", weights], ["product"]),
            helper.make_node("Tanh", ["product"], ["h_out"]),
            helper.make_node("Identity", ["go_on"], ["go_on_out"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h_in", TensorProto.FLOAT, ["batch", SLOW_WIDTH]),
        ],
        [
            helper.make_tensor_value_info("go_on_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h_out", TensorProto.FLOAT, ["batch", SLOW_WIDTH]),
        ],
    )
    trips, go_on = g.constant(steps, np.int64), g.constant(True, np.bool_)
    h = g.node("Loop", trips, go_on, start, body=body)
    magnitude = g.node("ReduceMean", g.node("Abs", h), axes=[1], keepdims=1)
    nothing = g.node("Floor", g.node("Mul", magnitude, g.constant(0.5)))
    g.node("Add", g.node("Add", x, g.constant(1)), nothing, out="y")
    g.output("y", TensorProto.FLOAT, [4])
    g.write(path)


MODELS: dict[str, tuple[Callable[[Path], None], int]] = {
    "mlp16": (mlp16, 64),
    "mlp784": (mlp784, 64),
    "encoder": (encoder, 32),
    "image": (image, 32),
    "echo": (echo, 32),
    "gather": (gather, 32),
    "dynamic": (dynamic, 16),
    "multi": (multi, 16),
    "slow": (slow, 8),
}
"""Each model's writer and the `max_batch_size` of its `config.yaml`."""


def write_repository(folder: Path, names: Sequence[str] = tuple(MODELS)) -> None:
    """Writes `<name>/1/model.onnx` and `<name>/config.yaml` under `folder` for each of `names`.

    Raises:
        KeyError: a name is not one of `MODELS`.
    """
    for name in names:
        write, max_batch_size = MODELS[name]
        write(folder / name / "1" / "model.onnx")
        (folder / name / "config.yaml").write_text(f"max_batch_size: {max_batch_size}\n")


def main(arguments: Sequence[str]) -> int:
    """Writes the repository that the command line asks for and returns the exit status."""
    if not arguments or arguments[0].startswith("-") or set(arguments[1:]) - set(MODELS):
        print(f"usage: models.py OUTDIR [{'|'.join(MODELS)}]...", file=sys.stderr)
        return 2
    folder, names = Path(arguments[0]), arguments[1:] or tuple(MODELS)
    for name in names:
        write_repository(folder, [name])
        size = (folder / name / "1" / "model.onnx").stat().st_size
        print(f"{name}: {size:,} bytes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
