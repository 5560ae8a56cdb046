"""A small convolutional network and its training, in plain NumPy.

NumPy rather than a framework: the whole example then needs nothing larger than scikit-learn, and
the same seed gives the same bytes. Images are [n, 8, 8, channels] (channels last), because then a
3x3 convolution is one matrix product over patches.

    image -> conv 3x3, 16 -> ReLU -> conv 3x3, 32 -> ReLU -> max pool 2x2 -> dense 10
"""

from collections.abc import Callable

import numpy as np

Weights = dict[str, np.ndarray]

# Chosen by cross-validation within the training images; the held-out ones had no say.
EPOCHS = 100
BATCH = 64
PEAK_RATE = 3e-3
LARGEST_SHIFT = 0.8  # in pixels, either way
LARGEST_SHEAR = 0.15  # of each entry of the 2x2 matrix that maps coordinates


def new_weights(rng: np.random.Generator) -> Weights:
    """Draws He-initialised float32 weights: convolutions as [9 * channels_in, channels_out]."""

    def draw(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * np.sqrt(2 / rows)).astype(np.float32)

    weights = {"conv1": draw(9, 16), "conv2": draw(9 * 16, 32), "dense": draw(4 * 4 * 32, 10)}
    biases = {f"{name}_bias": np.zeros(w.shape[1], np.float32) for name, w in weights.items()}
    return weights | biases


def patches(x: np.ndarray) -> np.ndarray:
    """Gathers the zero-padded 3x3 surroundings of each pixel: [n, 8, 8, c] -> [n * 64, 9 * c]."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[3])


def loss_gradient(weights: Weights, x: np.ndarray, labels: np.ndarray) -> tuple[float, Weights]:
    """Computes the mean cross-entropy of a batch and its gradient.

    Args:
        weights: as made by `new_weights`.
        x: float32 [n, 8, 8, 1], scaled to 0..1.
        labels: int64 [n].

    Returns:
        The loss, and a gradient for each of the weights.
    """
    n = len(x)
    in1 = patches(x)
    out1 = np.maximum(in1 @ weights["conv1"] + weights["conv1_bias"], 0)
    in2 = patches(out1.reshape(n, 8, 8, 16))
    out2 = np.maximum(in2 @ weights["conv2"] + weights["conv2_bias"], 0)
    quads = out2.reshape(n, 4, 2, 4, 2, 32)
    pooled = quads.max(axis=(2, 4), keepdims=True)
    features = pooled.reshape(n, -1)
    logits = features @ weights["dense"] + weights["dense_bias"]

    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    loss = -float(log_probabilities[np.arange(n), labels].mean())

    d_logits = np.exp(log_probabilities)
    d_logits[np.arange(n), labels] -= 1
    d_logits /= n
    d_pooled = (d_logits @ weights["dense"].T).reshape(pooled.shape)
    d_out2 = ((quads == pooled) * d_pooled).reshape(out2.shape) * (out2 > 0)
    # The gradient at the input of conv2 is a convolution with its kernel turned by 180 degrees.
    turned = weights["conv2"].reshape(3, 3, 16, 32)[::-1, ::-1].transpose(0, 1, 3, 2)
    d_out1 = patches(d_out2.reshape(n, 8, 8, 32)) @ turned.reshape(-1, 16) * (out1 > 0)
    return loss, {
        "conv1": in1.T @ d_out1,
        "conv1_bias": d_out1.sum(axis=0),
        "conv2": in2.T @ d_out2,
        "conv2_bias": d_out2.sum(axis=0),
        "dense": features.T @ d_logits,
        "dense_bias": d_logits.sum(axis=0),
    }


def distorted(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turns, shears, scales and shifts each of [n, 8, 8, 1] images a little, at random."""
    n = len(x)
    matrix = np.eye(2) + rng.uniform(-LARGEST_SHEAR, LARGEST_SHEAR, (n, 2, 2))
    shift = rng.uniform(-LARGEST_SHIFT, LARGEST_SHIFT, (n, 1, 1, 2))
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), axis=-1) - 3.5
    # The place each pixel is read from, in an image with a margin of two empty pixels all around.
    source = np.einsum("hwk,njk->nhwj", grid, matrix) + shift + 3.5 + 2
    source = np.clip(source, 0, 10.999)
    corner = np.floor(source).astype(np.int64)
    part = (source - corner).astype(np.float32)
    padded = np.pad(x[..., 0], ((0, 0), (2, 2), (2, 2)))
    image = np.arange(n)[:, None, None]
    result = np.zeros((n, 8, 8), np.float32)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = np.abs(1 - down - part[..., 0]) * np.abs(1 - right - part[..., 1])
        result += weight * padded[image, corner[..., 0] + down, corner[..., 1] + right]
    return result[..., None]


def train(
    images: np.ndarray, labels: np.ndarray, seed: int, report: Callable[[int, float], None]
) -> Weights:
    """Trains the network with Adam, a cosine learning rate and distorted images.

    Args:
        images: float32 [n, 8, 8], scaled to 0..1.
        labels: int64 [n], 0..9.
        seed: fixes the initial weights, the order of images and their distortion.
        report: called after each epoch with its number and mean loss.

    Returns:
        The trained float32 weights.
    """
    rng = np.random.default_rng(seed)
    weights = new_weights(rng)
    mean = {name: np.zeros_like(w) for name, w in weights.items()}
    square = {name: np.zeros_like(w) for name, w in weights.items()}
    steps_an_epoch = len(images) // BATCH
    step = 0
    for epoch in range(1, EPOCHS + 1):
        order = rng.permutation(len(images))
        total = 0.0
        for start in range(0, steps_an_epoch * BATCH, BATCH):
            chosen = order[start : start + BATCH]
            batch = distorted(images[chosen, :, :, None], rng)
            loss, gradient = loss_gradient(weights, batch, labels[chosen])
            total += loss
            step += 1
            rate = PEAK_RATE / 2 * (1 + np.cos(np.pi * step / (EPOCHS * steps_an_epoch)))
            for name, g in gradient.items():
                mean[name] += 0.1 * (g - mean[name])
                square[name] += 0.001 * (g * g - square[name])
                corrected = mean[name] / (1 - 0.9**step)
                scale = np.sqrt(square[name] / (1 - 0.999**step)) + 1e-8
                weights[name] -= (rate * corrected / scale).astype(np.float32)
        report(epoch, total / steps_an_epoch)
    return weights
