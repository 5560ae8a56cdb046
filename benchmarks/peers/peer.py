"""A server to compare with: how it is installed, started, asked and ended."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness import Gateway

from peers import workloads
from peers.answers import NO_ANSWER, ask
from peers.environments import Environment, need_program
from peers.processes import StartFailed, free_port, last_line, running
from peers.workloads import Request, Tensors, Wire, Workload

SERVERS = Path(__file__).resolve().parent / "servers"

MAX_ROWS = 32
"""Most rows of a batch, as in ``servers/runtime.py``."""

START_S = 90.0
"""What a server gets until its first good answer."""

POLL_S = 0.1
"""How often it is asked."""


@dataclass(frozen=True)
class Place:
    """Where one server is to run: its files, what its model is called, its port."""

    folder: Path
    tensors: Tensors
    port: int


@dataclass(frozen=True)
class Turn:
    """A request to one server, which is measured.

    Attributes:
        subject: what is measured, as targets call it.
        title: the same in the table.
    """

    subject: str
    title: str
    request: Request


@dataclass(frozen=True)
class Peer:
    """A server to compare with.

    Attributes:
        name: on the command line.
        title: in the table.
        wires: how it is asked, by the form of a workload; it takes no part in others.
        command: writes the configuration, if there is one, and gives the command; None: `Ours` has
            its own way.
        environment: what it is installed in; None: it needs none.
        path: of inference, with ``{model}``.
        models: it takes part in workloads of these alone; None: of all.
        fixed: what it is asked under load in place of an inference.
        probe: path of a GET that is measured as well, beside `MLP16`.
        runs_model: whether its answers are a model's, and can be checked.
        program: one that must be installed on the machine.
        settings: more environment variables, with ``{port}`` and ``{folder}``.
    """

    name: str
    title: str
    wires: Mapping[str, Wire]
    command: Callable[[Place], list[str]] | None = None
    environment: Environment | None = None
    path: str = "/inference"
    models: tuple[Tensors, ...] | None = None
    fixed: Request | None = None
    probe: str | None = None
    runs_model: bool = True
    program: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    def takes(self, workload: Workload) -> bool:
        """Whether it takes part."""
        mine = self.models is None or workload.tensors in self.models
        return mine and workload.form in self.wires

    def install(self) -> None:
        """Make what it needs. Missing, with the reason, when that cannot be had."""
        if self.program:
            need_program(self.program)
        if self.environment:
            self.environment.make()

    def turns(self, workload: Workload) -> list[Turn]:
        """What it is asked under load."""
        (row,) = workload.tensors.rows(1)
        inference = self.wires[workload.form].request(
            self.url_path(workload), workload.tensors, row
        )
        turns = [Turn(self.name, self.title, self.fixed or inference)]
        if self.probe and workload.tensors is workloads.MLP16:
            title = f"{self.title}, GET {self.probe}"
            turns.append(Turn(f"{self.name}-probe", title, Request(self.probe, "GET")))
        return turns

    def url_path(self, workload: Workload) -> str:
        """Where it takes inferences of the workload's model."""
        return self.path.format(model=workload.tensors.model)

    @contextmanager
    def serve(self, workload: Workload, model: Path, folder: Path) -> Iterator[tuple[int, int]]:
        """A server that answers; gives its port and its first process. StartFailed when it does not."""
        place = Place(folder, workload.tensors, free_port())
        environment = {
            "PEER_MODEL": str(model),
            "PEER_FORM": self.wires[workload.form].form,
            "PEER_PORT": str(place.port),
            "PEER_NAME": workload.tensors.model,
            "PEER_FOLDER": str(folder),
            "PYTHONPATH": str(SERVERS),
            "PYTHONDONTWRITEBYTECODE": "1",
            "ORT_DISABLE_TELEMETRY": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TMPDIR": str(folder),
            **{
                name: value.format(port=place.port, folder=folder)
                for name, value in self.settings.items()
            },
        }
        if self.environment:
            environment["PATH"] = f"{self.environment.bin}:/usr/bin:/bin"
        log = folder / "log"
        with running(self.command(place), environment, log) as process:
            self._wait(workload, place.port, process, log)
            yield place.port, process.pid

    def _wait(
        self, workload: Workload, port: int, process: subprocess.Popen[bytes], log: Path
    ) -> None:
        """Return once it answers a request well."""
        (row,) = workload.tensors.rows(1)
        wire, path = self.wires[workload.form], self.url_path(workload)
        until, reason = time.monotonic() + START_S, "it ended"
        while time.monotonic() < until and process.poll() is None:
            try:
                ask(port, path, wire, workload.tensors, row)
                return
            except NO_ANSWER as error:
                reason = str(error)
            time.sleep(POLL_S)
        said = last_line(log.read_text(errors="replace"))
        raise StartFailed(f"no answer after its start ({reason}); its log ends: {said}")


@dataclass(frozen=True)
class Ours(Peer):
    """``gateway serve``.

    Attributes:
        window_us: how long an idle worker waits for more rows; 0 is the default.
    """

    window_us: int = 0

    @contextmanager
    def serve(self, workload: Workload, model: Path, folder: Path) -> Iterator[tuple[int, int]]:
        """As of any peer."""
        version = folder / "repository" / workload.tensors.model / "1"
        version.mkdir(parents=True)
        shutil.copy(model, version / "model.onnx")
        (version.parent / "config.yaml").write_text(
            f"max_batch_size: {MAX_ROWS}\nmax_queue_delay_us: {self.window_us}\n"
            "instances: [{device: cpu, count: 1, threads: 1}]\n"
        )
        with ExitStack() as stack:
            try:
                gateway = stack.enter_context(Gateway(folder / "repository"))
            except RuntimeError as error:
                raise StartFailed(last_line(str(error))) from None
            yield gateway.port, gateway.pid
