"""What a request costs here and in other servers: the same models, the same machine, in turns.

    python benchmarks/peers.py [--peers mosec,aiohttp,...] [--cases mlp16-binary,...]
                               [--rounds 5] [--seconds 3]

Each peer runs in an environment of its own, with pinned versions, which is made on first use. All have
one worker with one ONNX Runtime thread, batches of at most 32 rows, and a window of 2 ms where they have
such a setting; each is asked in its fastest documented form. Before the load, 64 requests with rows of
their own, 32 in flight, are compared with ONNX Runtime's answers. Then all servers of a workload take
turns, and targets are ratios within a round. The gateway takes part as it is installed, without a window
unless its title says so. `peers/` has the parts; a peer that cannot be had or started is left out, and
the notes say why.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peers.catalogue import PEERS
from peers.environments import Missing, need_program
from peers.peer import Peer
from peers.publishing import publish
from peers.results import BARE, Case, Results
from peers.stage import Stage
from peers.workloads import WORKLOADS, Workload

ROUNDS = 5
ROUND_S = 3
LONGEST_S = 60
MOST_ROUNDS = 50


def chosen(text: str | None, names: Sequence[str]) -> set[str]:
    """Names from a list with commas; all where there is none. ValueError for one that is unknown."""
    wanted = set(names) if text is None else {name.strip() for name in text.split(",")}
    if unknown := wanted - set(names):
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    return wanted


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare the gateway with other servers.")
    parser.add_argument("--peers", help="names with commas: " + ", ".join(p.name for p in PEERS))
    parser.add_argument(
        "--cases", help="names with commas: " + ", ".join(w.name for w in WORKLOADS)
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, choices=range(1, MOST_ROUNDS + 1))
    parser.add_argument("--seconds", type=int, default=ROUND_S, choices=range(1, LONGEST_S + 1))
    options = parser.parse_args(words)
    try:
        options.peers = chosen(options.peers, [peer.name for peer in PEERS])
        options.cases = chosen(options.cases, [workload.name for workload in WORKLOADS])
    except ValueError as error:
        parser.error(str(error))
    return options


def installed(names: set[str], results: Results) -> list[Peer]:
    """The peers of these names that can be had; the others get a note."""
    there = []
    for peer in PEERS:
        if peer.name in names:
            try:
                peer.install()
                there.append(peer)
            except Missing as missing:
                results.note(peer.title, f"left out: {missing}")
    return there


def measure(
    workload: Workload, peers: Sequence[Peer], options: argparse.Namespace, results: Results
) -> None:
    """All rounds of one workload."""
    results.titles[BARE] = "ONNX Runtime alone"
    for connections in (0, *workload.connections):
        results.titles[Case(workload.name, connections)] = workload.title(connections)
    mine = [peer for peer in peers if peer.takes(workload)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Stage(workload, mine, results, Path(folder)).run(options.rounds, options.seconds)


def main(words: Sequence[str]) -> int:
    """Measure and report; the exit status is 0 whatever the numbers are."""
    options = arguments(words)
    # So that ending this ends the servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = Results()
    try:
        need_program("wrk")
    except Missing as missing:
        print(f"peers.py: {missing}", file=sys.stderr)
        return 1
    try:
        peers = installed(options.peers, results)
        for workload in WORKLOADS:
            if workload.name in options.cases:
                measure(workload, peers, options, results)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    publish(results, options.rounds, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
