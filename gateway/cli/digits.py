"""The digits example: its held-out images, how they look in a terminal, and how a server is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import numpy.typing as npt
import orjson

from gateway.errors import ConfigurationError, GatewayError

MODEL = "digits"

ABOUT = {
    1: "logistic regression",
    2: "convolutional network",
    3: "broken on purpose: swaps rows and columns",
}
"""The bundled versions, for whoever compares them."""

MAX_PIXEL = 16

_SHADES = " ░▒▓█"
_HEADER = orjson.dumps(
    {
        "inputs": [
            {
                "name": "image",
                "datatype": "FP32",
                "shape": [1, 8, 8],
                "parameters": {"binary_data_size": 8 * 8 * 4},
            }
        ]
    }
)
_HTTP_HEADERS = {"Inference-Header-Content-Length": str(len(_HEADER))}


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Images that no version has seen in training: uint8 [N, 8, 8] of 0..16, and int64 [N]."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    @classmethod
    def load(cls, path: Path) -> HeldOut:
        """Read an ``.npz`` file. ConfigurationError if it is not one of these."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                images, labels = arrays["images"], arrays["labels"]
        except (OSError, ValueError, KeyError, EOFError):
            raise ConfigurationError(f"{path} is not the digits' held_out.npz") from None
        if images.shape != (len(labels), 8, 8) or images.dtype != np.uint8 or not len(labels):
            raise ConfigurationError(f"{path} is not the digits' held_out.npz")
        return cls(images, labels)

    def bodies(self) -> list[bytes]:
        """One request per image: JSON, then the pixels as raw FP32."""
        return [_HEADER + image.astype("<f4").tobytes() for image in self.images]

    def correct(self, answers: Iterable[Answer]) -> int:
        """How many of the answers, one per image and in their order, are right."""
        pairs = zip(answers, self.labels.tolist(), strict=True)
        return sum(answer.digit == label for answer, label in pairs)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server sees in one image, how sure it is, and which version answered."""

    digit: int
    probability: float
    version: int


class DigitsClient:
    """Asks a server about images.

    Args:
        session: used for every request; its connector bounds the connections.
        url: of the data port.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._model_url = f"{url}/v2/models/{MODEL}"

    async def classify(self, body: bytes, version: int | None = None) -> Answer:
        """One image, by the given version or the routed one. GatewayError when it fails."""
        url = self._model_url if version is None else f"{self._model_url}/versions/{version}"
        try:
            async with self._session.post(f"{url}/infer", data=body, headers=_HTTP_HEADERS) as http:
                document = orjson.loads(await http.read())
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise GatewayError(f"the server does not answer: {error!r}") from None
        if http.status != 200:
            raise GatewayError(f"the server answered {http.status}: {document.get('error')}")
        outputs = {output["name"]: output["data"] for output in document["outputs"]}
        (digit,) = outputs["label"]
        return Answer(digit, outputs["probabilities"][digit], int(document["model_version"]))

    async def classify_all(
        self,
        bodies: Sequence[bytes],
        connections: int,
        version: int | None = None,
        on_answer: Callable[[], object] = lambda: None,
    ) -> list[Answer]:
        """Many images, ``connections`` at a time; the answers in their order."""
        answers: list[Answer | None] = [None] * len(bodies)
        jobs = iter(enumerate(bodies))

        async def work() -> None:
            for index, body in jobs:
                answers[index] = await self.classify(body, version)
                on_answer()

        await asyncio.gather(*(work() for _ in range(connections)))
        return [answer for answer in answers if answer is not None]

    async def executions(self) -> tuple[int, int]:
        """Images and batches run so far, copies as well, by all versions together."""
        try:
            async with self._session.get(f"{self._model_url}/stats") as http:
                versions = orjson.loads(await http.read())["model_stats"]
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            raise GatewayError(f"the server does not answer: {error!r}") from None
        sizes = [
            (size["batch_size"], size["compute_infer"]["count"])
            for version in versions
            for size in version["batch_stats"]
        ]
        return sum(size * count for size, count in sizes), sum(count for _, count in sizes)


def draw(image: npt.NDArray[np.uint8]) -> list[str]:
    """The image as 8 lines of 16 characters: two a pixel, which makes it about square."""
    levels = np.minimum(image, MAX_PIXEL).astype(int) * (len(_SHADES) - 1)
    shades = (levels + MAX_PIXEL // 2) // MAX_PIXEL
    return ["".join(_SHADES[shade] * 2 for shade in row) for row in shades.tolist()]


def as_json(image: npt.NDArray[np.uint8], indent: str) -> str:
    """The image as nested JSON lists, two rows of pixels a line."""
    rows = [orjson.dumps(row).decode() for row in image.tolist()]
    lines = [", ".join(rows[at : at + 2]) for at in range(0, len(rows), 2)]
    return "[" + f",\n{indent}".join(lines) + "]"
