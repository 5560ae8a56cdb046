"""One workload: its servers are started, checked, loaded in turns, and ended.

Servers that take no CPU time while idle stay up and take turns, so that what is compared is measured
seconds apart. One that does would disturb the others: it is started for its turns in each round, and
ended after them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bare import BareLoop
from harness import wait_for_quiet
from models import MODELS

from peers.answers import Oracle
from peers.load import LoadFailed, Meter, Target, load, load_in_bursts
from peers.peer import Peer
from peers.processes import StartFailed, idle_cores
from peers.results import BARE, Case, Key, Results, Sample
from peers.workloads import Workload

IDLE_CORES = 0.01
"""A server that takes more of a core when idle is started for its turns alone."""

IDLE_S = 1.0
"""How long that is watched."""

SETTLE_S = 5.0
"""How long a server gets to become idle after a load."""

CALM_CORES = 0.5
"""What a server may take when another has its turn: less than the requests that a load left behind."""

CALM_S = 0.05
"""How long that is watched."""

WARM_UP_S = 1
"""A load before the first that counts."""

BURSTS_S = 8
"""The least that a turn takes where few large batches are answered."""

QUIET_S = 10.0
"""How long a round waits for other work on the machine to end."""

SEARCH_S = 0.5
"""How long the bare loop tries each batch size."""

SEARCH_ROUNDS = 3


@dataclass(frozen=True)
class Server:
    """One that runs."""

    peer: Peer
    port: int
    root: int


class Stage:
    """One workload and the peers that take part."""

    def __init__(self, workload: Workload, peers: Sequence[Peer], results: Results, folder: Path):
        self._workload, self._results, self._folder = workload, results, folder
        self._model = folder / "model.onnx"
        MODELS[workload.tensors.model][0](self._model)
        self._oracle = Oracle(self._model, workload.tensors)
        self._standing: list[Server] = []
        self._guests: list[Peer] = []
        self._peers = peers
        self._started = 0

    def run(self, rounds: int, seconds: int) -> None:
        """Measure everything, in rounds."""
        if self._workload.in_bursts:
            seconds = max(seconds, BURSTS_S)
        with ExitStack() as stack:
            for peer in self._peers:
                self._guarded(peer, partial(self._admit, peer, stack))
            bare = self._bare(stack) if self._workload.bare_rows else None
            for number in range(rounds):
                wait_for_quiet(QUIET_S)
                self._round(number, seconds, bare)

    def _guarded(self, peer: Peer, do: Callable[[], None]) -> None:
        """Do something with a peer; what goes wrong becomes a note, and the others go on."""
        try:
            do()
        except (StartFailed, LoadFailed) as error:
            self._note(peer, str(error))

    def _note(self, peer: Peer, text: str) -> None:
        print(f"{self._workload.name}: {peer.title}: {text}", flush=True)
        self._results.note(peer.title, f"{self._workload.name}: {text}")

    @contextmanager
    def _serve(self, peer: Peer) -> Iterator[Server]:
        self._started += 1
        folder = self._folder / str(self._started)  # short: there will be Unix sockets in it
        folder.mkdir()
        with peer.serve(self._workload, self._model, folder) as (port, root):
            yield Server(peer, port, root)

    def _admit(self, peer: Peer, stack: ExitStack) -> None:
        """Start a server, check its answers, and keep it unless it burns CPU time when idle."""
        for turn in peer.turns(self._workload):
            self._results.titles[turn.subject] = turn.title
        with ExitStack() as trial:
            server = trial.enter_context(self._serve(peer))
            if peer.runs_model:
                path, wire = peer.url_path(self._workload), peer.wires[self._workload.form]
                verdict = self._oracle.judge(server.port, path, wire)
                if not verdict.good:
                    self._note(peer, str(verdict))
                if verdict.wrong:
                    return
            connections = self._workload.connections[0]
            for turn in peer.turns(self._workload):
                target = Target(server.port, server.root, turn.request)
                # Who answers nothing yet may still do so in its turn.
                with suppress(LoadFailed):
                    load(target, connections, WARM_UP_S, self._folder)
            idle = idle_cores(server.root, IDLE_CORES, IDLE_S, SETTLE_S)
            if idle > IDLE_CORES:
                self._note(peer, f"started for its turns alone: idle, it takes {idle:.2f} cores")
                self._guests.append(peer)
            else:
                self._standing.append(server)
                stack.enter_context(trial.pop_all())

    def _bare(self, stack: ExitStack) -> tuple[BareLoop, int]:
        """The bare loop, and its best number of rows for CPU time."""
        loop = stack.enter_context(closing(BareLoop(self._model)))
        sizes = self._workload.bare_rows
        tries = [
            {size: loop.rates(size, SEARCH_S)[1] for size in sizes} for _ in range(SEARCH_ROUNDS)
        ]
        best = max(sizes, key=lambda size: statistics.median(each[size] for each in tries))
        return loop, best

    def _round(self, number: int, seconds: int, bare: tuple[BareLoop, int] | None) -> None:
        """Everything once."""
        if bare:
            self._add(0, BARE, number, bare_sample(*bare, seconds))
        for connections in self._workload.connections:
            for server in self._standing:
                self._guarded(
                    server.peer, partial(self._turns, server, connections, number, seconds)
                )
        for peer in self._guests:
            self._guarded(peer, partial(self._visit, peer, number, seconds))

    def _visit(self, peer: Peer, number: int, seconds: int) -> None:
        """All turns of a server that is there for them alone."""
        with self._serve(peer) as server:
            for connections in self._workload.connections:
                self._turns(server, connections, number, seconds)

    def _turns(self, server: Server, connections: int, number: int, seconds: int) -> None:
        """What one server is asked, with so many connections."""
        measure = load_in_bursts if self._workload.in_bursts else load
        for turn in server.peer.turns(self._workload):
            target = Target(server.port, server.root, turn.request)
            sample = measure(target, connections, seconds, self._folder)
            self._add(connections, turn.subject, number, sample)
            idle_cores(server.root, CALM_CORES, CALM_S, SETTLE_S)

    def _add(self, connections: int, subject: str, number: int, sample: Sample) -> None:
        case = Case(self._workload.name, connections)
        self._results.add(Key(case, subject), number, sample)
        print(
            f"{number + 1}: {self._workload.title(connections)}, {subject}: {sample.cpu_us:.1f} µs, "
            f"{sample.rate:.0f}/s, p50 {sample.p50_ms:.3f} ms, others {sample.others:.2f} cores",
            flush=True,
        )


def bare_sample(loop: BareLoop, rows: int, seconds: float) -> Sample:
    """One turn of the bare loop; a request is a row, and its latency that of its run."""
    meter = Meter(loop.pid)
    rate, cpu_rate = loop.rates(rows, seconds)
    _, _, others = meter.read()
    return Sample(1e6 / cpu_rate, rate, 1e3 * rows / rate, None, 0, None, others)
