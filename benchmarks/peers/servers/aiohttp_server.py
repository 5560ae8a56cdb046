"""What a good afternoon gives: aiohttp on uvloop, an asyncio queue that batches, a thread that runs.

Batches are put together while the one before runs, so under load it waits for no timer.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import uvloop
from aiohttp import web
from runtime import MAX_ROWS, PORT, WINDOW_S, Model, read, write

MAX_BODY_BYTES = 64 << 20

Waiting = tuple[np.ndarray, "asyncio.Future[np.ndarray]"]


class Batcher:
    """Rows from many requests to one model, in batches."""

    def __init__(self) -> None:
        self._model = Model()
        self._thread = ThreadPoolExecutor(1)
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue()

    async def infer(self, row: np.ndarray) -> np.ndarray:
        """The answer of one row."""
        answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((row, answer))
        return await answer

    async def _collect(self) -> list[Waiting]:
        """The next batch: the first row, and what comes within the window after it."""
        batch = [await self._queue.get()]
        try:
            async with asyncio.timeout(WINDOW_S):
                while len(batch) < MAX_ROWS:
                    batch.append(await self._queue.get())
        except TimeoutError:
            pass
        return batch

    async def run(self) -> None:
        """Serve batches for ever."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._collect()
            rows = [row for row, _ in batch]
            try:
                answers = await loop.run_in_executor(self._thread, self._model.run_rows, rows)
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), made in zip(batch, answers, strict=True):
                if not answer.done():
                    answer.set_result(made)


async def application() -> web.Application:
    """One route."""
    batcher = Batcher()

    async def infer(request: web.Request) -> web.Response:
        return web.Response(body=write(await batcher.infer(read(await request.read()))))

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_post("/inference", infer)
    app["batcher"] = asyncio.create_task(batcher.run())
    return app


if __name__ == "__main__":
    web.run_app(
        application(), host="127.0.0.1", port=PORT, access_log=None, loop=uvloop.new_event_loop()
    )
