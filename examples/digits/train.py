"""Trains the three versions of the `digits` model that the demo serves.

    python -m venv /tmp/digits && /tmp/digits/bin/pip install -r requirements.txt
    /tmp/digits/bin/python train.py            # less than a minute; --output DIR writes elsewhere

The versions share one signature and differ in how well they answer, so that a roll-out has
something to find: 1 is good, 2 is better, 3 is broken on purpose.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import network
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

SEED = 0
OPSET = 17
IR_VERSION = 8  # the one that came with opset 17: older runtimes load it too
LARGEST_PIXEL = 16.0

Nodes = list[onnx.NodeProto]
Constants = dict[str, np.ndarray]

DESCRIPTIONS = {
    1: "Linear model (multinomial logistic regression).",
    2: "Convolutional network: conv 3x3 16, conv 3x3 32, max pool 2x2, dense 10.",
    3: "BROKEN ON PURPOSE: the network of version 2, fed with rows and columns of the image swapped.",
}


def linear_graph(model: LogisticRegression) -> tuple[Nodes, Constants]:
    """Builds the nodes from `scaled` [batch, 8, 8] to `logits` [batch, 10] of version 1."""
    nodes = [
        helper.make_node("Flatten", ["scaled"], ["pixels"], axis=1),
        helper.make_node("Gemm", ["pixels", "weight", "bias"], ["logits"]),
    ]
    constants = {
        "weight": model.coef_.T.astype(np.float32),
        "bias": model.intercept_.astype(np.float32),
    }
    return nodes, constants


def network_graph(weights: network.Weights, swap_axes: bool) -> tuple[Nodes, Constants]:
    """Builds the nodes from `scaled` to `logits` of version 2, or of 3 with `swap_axes`.

    Swapped axes are what an exporter that takes row-major images for column-major ones produces: it
    loads, runs, has the right shapes and answers with confidence, and only accuracy tells.
    """
    nodes: Nodes = []
    if swap_axes:
        nodes.append(helper.make_node("Transpose", ["scaled"], ["grid"], perm=[0, 2, 1]))
    constants = {"channel_axis": np.array([1], np.int64)}
    nodes.append(
        helper.make_node("Unsqueeze", ["grid" if swap_axes else "scaled", "channel_axis"], ["in1"])
    )
    for layer, (before, after, channels) in enumerate((("in1", "in2", 1), ("in2", "out2", 16)), 1):
        name = f"conv{layer}"
        kernel = weights[name].reshape(3, 3, channels, -1).transpose(3, 2, 0, 1)
        constants[f"{name}_weight"] = np.ascontiguousarray(kernel)
        constants[f"{name}_bias"] = weights[f"{name}_bias"]
        inputs = [before, f"{name}_weight", f"{name}_bias"]
        nodes.append(helper.make_node("Conv", inputs, [name], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [name], [after]))
    # Training keeps channels last, ONNX keeps them first: the dense rows are put in ONNX's order.
    dense = weights["dense"].reshape(4, 4, 32, 10).transpose(2, 0, 1, 3).reshape(-1, 10)
    constants["dense_weight"] = np.ascontiguousarray(dense)
    constants["dense_bias"] = weights["dense_bias"]
    nodes += [
        helper.make_node("MaxPool", ["out2"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["pooled"], ["features"], axis=1),
        helper.make_node("Gemm", ["features", "dense_weight", "dense_bias"], ["logits"]),
    ]
    return nodes, constants


def write_model(version: int, nodes: Nodes, constants: Constants, path: Path) -> None:
    """Wraps nodes from `scaled` to `logits` in the common signature, checks and writes them.

    The signature: `image` FP32 [batch, 8, 8], raw pixels 0..16, in; `probabilities` FP32
    [batch, 10] and `label` INT64 [batch] out.
    """
    constants = constants | {"largest_pixel": np.float32(LARGEST_PIXEL)}
    graph = helper.make_graph(
        [
            helper.make_node("Div", ["image", "largest_pixel"], ["scaled"]),
            *nodes,
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
            helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
        ],
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 8, 8])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10]),
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        doc_string="Handwritten digits 0..9 from 8x8 images with raw pixel values 0..16.",
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="inference-gateway examples/digits/train.py",
        model_version=version,
        doc_string=DESCRIPTIONS[version],
    )
    helper.set_model_props(
        model,
        {
            "description": DESCRIPTIONS[version],
            "training_data": "scikit-learn load_digits (UCI Optical Recognition of Digits)",
        },
    )
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def count_correct(path: Path, images: np.ndarray, labels: np.ndarray) -> int:
    """Counts the held-out images that the written file labels correctly in ONNX Runtime."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported, hence the order
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (answers,) = session.run(["label"], {"image": images.astype(np.float32)})
    return int((answers == labels).sum())


def write_accuracy(correct: dict[int, int], total: int, folder: Path) -> None:
    """Writes `accuracy.json` and the same as a table, `ACCURACY.md`."""
    table = {
        str(version): {"correct": count, "total": total, "accuracy": round(count / total, 4)}
        for version, count in correct.items()
    }
    (folder / "accuracy.json").write_text(json.dumps(table, indent=2) + "\n")
    lines = [
        "# Accuracy on the held-out images",
        "",
        "Written by `train.py`, measured with ONNX Runtime on `held_out.npz`.",
        "",
        "| version | correct | of | accuracy | what it is |",
        "| ---: | ---: | ---: | ---: | --- |",
    ]
    for version, count in correct.items():
        share = f"{100 * count / total:.2f} %"
        lines.append(f"| {version} | {count} | {total} | {share} | {DESCRIPTIONS[version]} |")
    (folder / "ACCURACY.md").write_text("\n".join(lines) + "\n")


def report_epoch(epoch: int, loss: float) -> None:
    """Shows how far the training is: one line that rewrites itself, or a few where it cannot."""
    if sys.stdout.isatty() or epoch % 10 == 0:
        end = "\r" if sys.stdout.isatty() and epoch < network.EPOCHS else "\n"
        print(f"  epoch {epoch:3d} of {network.EPOCHS}, loss {loss:.4f}", end=end, flush=True)


def main() -> None:
    """Trains, writes and measures the three versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent)
    folder = parser.parse_args().output

    digits = load_digits()
    images, held_images, labels, held_labels = train_test_split(
        digits.images.astype(np.uint8),
        digits.target.astype(np.int64),
        test_size=1 / 3,
        stratify=digits.target,
        random_state=SEED,
    )
    scaled = images.astype(np.float32) / np.float32(LARGEST_PIXEL)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "held_out.npz", images=held_images, labels=held_labels)

    # With one BLAS thread, sums are always added up in the same order: same seed, same bytes.
    with threadpool_limits(limits=1):
        print(f"linear model on {len(images)} images", flush=True)
        linear = LogisticRegression(max_iter=5000).fit(scaled.reshape(-1, 64), labels)
        print(f"convolutional network on {len(images)} images", flush=True)
        weights = network.train(scaled, labels, SEED, report_epoch)

    graphs = {
        1: linear_graph(linear),
        2: network_graph(weights, swap_axes=False),
        3: network_graph(weights, swap_axes=True),
    }
    correct = {}
    for version, (nodes, constants) in graphs.items():
        path = folder / "models" / "digits" / str(version) / "model.onnx"
        write_model(version, nodes, constants, path)
        correct[version] = count_correct(path, held_images, held_labels)
        print(f"version {version}: {correct[version]} of {len(held_labels)} right", flush=True)
    write_accuracy(correct, len(held_labels), folder)


if __name__ == "__main__":
    main()
