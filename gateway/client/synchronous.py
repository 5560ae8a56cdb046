"""The client without asyncio: `AsyncClient` on an event loop of its own, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, TypeVar

from gateway.client.asynchronous import AsyncClient
from gateway.client.encoding import Answer, Array, Encoding
from gateway.client.failover import Waiting

T = TypeVar("T")


class Client:
    """Asks one or several gateways; the arguments and errors are those of `AsyncClient`.

    Use it as a context manager, or `close` it. Threads may share one; it must not be used in a process
    that was forked off after it was made.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        encoding: Encoding = "binary",
        timeout_s: float = 30.0,
        connections: int = 100,
        retries: int = 3,
        headers: Mapping[str, str] | None = None,
        waiting: Waiting | None = None,
    ) -> None:
        self._client = AsyncClient(
            addresses,
            encoding=encoding,
            timeout_s=timeout_s,
            connections=connections,
            retries=retries,
            headers=headers,
            waiting=waiting,
        )
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        # A daemon: a client that nobody closed does not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="gateway-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and close every connection; calls in other threads fail with RuntimeError."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: int | str | None = None,
        outputs: Sequence[str] | None = None,
        request_id: str | None = None,
        queue_timeout_s: float | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """Run a model on arrays; see `AsyncClient.infer`."""
        return self._wait(
            self._client.infer(
                model,
                inputs,
                version=version,
                outputs=outputs,
                request_id=request_id,
                queue_timeout_s=queue_timeout_s,
                priority=priority,
                timeout_s=timeout_s,
            )
        )

    def live(self, *, timeout_s: float | None = None) -> bool:
        """Whether any address answers that it is up."""
        return self._wait(self._client.live(timeout_s=timeout_s))

    def ready(self, *, timeout_s: float | None = None) -> bool:
        """Whether any address answers that it is ready for requests."""
        return self._wait(self._client.ready(timeout_s=timeout_s))

    def model_ready(
        self, model: str, version: int | str | None = None, *, timeout_s: float | None = None
    ) -> bool:
        """Whether the model is ready at any address; see `AsyncClient.model_ready`."""
        return self._wait(self._client.model_ready(model, version, timeout_s=timeout_s))

    def metadata(
        self, model: str, version: int | str | None = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Names, datatypes and shapes of the model's inputs and outputs."""
        return self._wait(self._client.metadata(model, version, timeout_s=timeout_s))

    def statistics(
        self, model: str | None = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """What the model, or every model, has done; see `AsyncClient.statistics`."""
        return self._wait(self._client.statistics(model, timeout_s=timeout_s))

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._closed:
                call.close()
                raise RuntimeError("the client is closed")
            future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise RuntimeError("the client was closed during the call") from None
        except BaseException:
            future.cancel()  # Ctrl-C ends the call, too
            raise

    def _run(self) -> None:
        """The thread: serves calls until `close`, then cancels what is left."""
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        async with self._client:
            await self._closing.wait()
            calls = asyncio.all_tasks() - {asyncio.current_task()}
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
