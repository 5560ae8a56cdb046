"""Whether rollouts end as they should under load, and go on where they were after SIGKILL.

    python benchmarks/rollouts.py [--parts rollouts,kills,splits]

Twenty rollouts in a row under 500 requests a second: ten good versions, and ten that are bad in different
ways. Then a rollout whose server is killed again and again at random moments. Then 100,000 requests for
each split of a route, with and without keys, in both lanes. Everything is the system tests' own.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from report import ROOT, Report, spread

sys.path.insert(0, str(ROOT))
from tests.system import rolling
from tests.system.rolling import Admin, Load
from tests.system.server import LANES, Server

GOOD, ROLLOUTS, FIRST = "good", 20, 2
"""A kind, how many rollouts, and the first one's version."""

BAD = ("failing", "wrong", "slow", "crashing", "broken", "hanging", "dead")
"""Ways to be bad, in turn: ``dead`` fails every request."""

LAYERS, SLOW_LAYERS = 150, 240
"""Of the twenty's versions: about a millisecond, and half as much again."""

ENDS = {GOOD: "SUCCEEDED", "broken": "FAILED", "hanging": "FAILED"}
"""How a rollout of a kind must end, if not ABORTED."""

KILLS, SPLIT_REQUESTS = 50, 100_000
WEIGHTS = (100, 1000, 5000, 9000)
LOAD_TIMEOUT_S = "10"

COPIES = {"weight_bp": 0, "mirror_percent": 50, "min_requests": 20}

SPEC = {
    "metrics": [
        {"name": "errors", "source": "errors", "margin": 0.02},
        {"name": "compute", "source": "compute", "margin": 0.2, "slack_ms": 0},
        {"name": "agreement", "source": "agreement", "bound": 0.85},
    ],
    "steps": [
        COPIES,
        {"weight_bp": 2000, "min_requests": 60, "mirror_percent": 75},
        {"weight_bp": 5000, "min_requests": 60},
    ],
    "skip_requests": 10,
    "abort_keep_warm_s": 0,
    "progress_deadline_s": 120,
}


def roll(repository: Path, report: Report) -> bool:
    """Every rollout, one row for each kind; whether each ended as it should and nobody else failed."""
    kinds = [GOOD if i % 2 == 0 else BAD[i // 2 % len(BAD)] for i in range(ROLLOUTS)]
    took: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    ends, failed, beyond = Counter(), Counter(), 0
    with (
        Server(repository, GATEWAY_LOAD_TIMEOUT_S=LOAD_TIMEOUT_S) as server,
        Admin(server.admin_url) as admin,
        Load(server.url) as load,
    ):
        for number, kind in enumerate(kinds, FIRST):
            above = 0 if kind == "dead" else rolling.ODD
            layers = SLOW_LAYERS if kind == "slow" else LAYERS
            made_as = {"dead": "failing", "slow": GOOD}.get(kind, kind)
            admin.register(made_as, number, above, layers)
            begun, begun_s = len(load.answers), time.monotonic()
            steps = SPEC["steps"][1:] if kind in ("dead", "crashing") else SPEC["steps"]
            metrics = SPEC["metrics"][: 3 if len(steps) == 3 else 2]
            spec = SPEC | {"canary": number, "steps": steps, "metrics": metrics}
            rollout = admin.wait_end(admin.start(spec)["id"], 180)
            took.setdefault(kind, []).append(time.monotonic() - begun_s)
            reasons[kind] = rollout["reason"]
            print(f"{kind}: {rollout['state']}: {rollout['reason']}", flush=True)
            ends[kind] += rollout["state"] == ENDS.get(kind, "ABORTED")
            found = rolling.exposure(load.answers[begun:], rollout, admin.events(rollout["id"]))
            beyond += found.answered > found.most
    # At the end: what a canary that ends its workers held may be answered when its rollout is long over.
    for answer in rolling.failures(load.answers):
        at = answer.version - FIRST
        failed[kinds[at] if at >= 0 else GOOD] += 1
    for kind, times in took.items():
        end = ENDS.get(kind, "ABORTED")
        right = f"{ends[kind]} of {len(times)} {end}"
        report.rows.append([f"rollout, {kind}", right, spread(times, 1), str(failed[kind])])
    report.notes.append(
        f"{len(load.answers):,} requests at {load.rate:g}/s; not answered, or wrongly, by a good version: "
        f"{failed[GOOD]}; canaries that answered more than their weight by 4 standard deviations: {beyond}"
    )
    report.notes += [f"{kind}: {reasons[kind]}" for kind in took if kind != GOOD]
    return sum(ends.values()) == ROLLOUTS and not failed[GOOD] and not beyond


def kill(repository: Path, report: Report) -> bool:
    """SIGKILL at random moments. AssertionError where a rollout did not go on as the store had it."""
    chance, kills, stayed = random.Random(7), 0, Counter()
    steps = [{"weight_bp": weight, "min_requests": 60} for weight in (1500, 3000, 5000, 8000)]
    spec = {"steps": steps, "metrics": [], "abort_keep_warm_s": 0}
    spec["sticky"] = {"key": "header:X-User"}
    number, identity, before, route = 1, "", {"state": "SUCCEEDED"}, {}
    while True:
        with rolling.start_again(repository) as server, Admin(server.admin_url) as admin:
            if identity:
                rolling.check_resumed(before, route, server, admin, identity)
            if kills == KILLS:
                break
            if before["state"] in rolling.ENDS:
                number += 1
                admin.register(GOOD, number)
                identity = admin.start(spec | {"canary": number})["id"]
            with Load(server.url, rate=200, keys=rolling.KEYS):
                time.sleep(chance.uniform(0, 2))
                rolling.kill_all(server)
        kills += 1
        before, route = rolling.stored(repository, identity)
        stayed[before["state"]] += 1
        if not rolling.is_whole(repository):
            raise RuntimeError("the database is damaged")
    where = ", ".join(f"{state} {count}" for state, count in stayed.most_common())
    report.rows.append(["SIGKILL", f"{kills} of {KILLS} went on", "", ""])
    report.notes.append(
        f"states in which the server was killed: {where}; after each the rollout, its statistics, the route "
        "and 100 answers to sticky keys were as the store had them"
    )
    return True


def split(repository: Path, report: Report) -> bool:
    """Requests for each weight; whether the parts are the weights'."""
    worst = 0.0
    keys = tuple(f"user-{i}" for i in range(SPLIT_REQUESTS))
    rounds = [(lane, keyed) for lane in LANES for keyed in ((), keys)]
    for lane, keyed in rounds:
        with Server(repository, **LANES[lane]) as server, Admin(server.admin_url) as admin:
            main = admin.ask("GET", f"/models/{rolling.MODEL}")["route"]["shares"][-1]["version"]
            other = 1 if main != 1 else 2
            admin.ask("POST", f"/models/{rolling.MODEL}/versions/{other}:load")
            for weight in WEIGHTS:
                shares = [(other, weight), (main, 10_000 - weight)]
                route = {
                    "shares": [{"version": v, "weight_bp": bp} for v, bp in shares],
                    "sticky": {"key": "header:X-User"},
                }
                admin.ask("PUT", f"/models/{rolling.MODEL}/route", json=route)
                many = SPLIT_REQUESTS // len(WEIGHTS)
                with Load(server.url, rate=None, keys=keyed, most=many) as load:
                    load.wait()
                share, count = weight / 10_000, len(load.answers)
                got = sum(answer.version == other for answer in load.answers)
                off = abs(got - count * share) / math.sqrt(count * share * (1 - share))
                worst = max(worst, off)
            admin.ask("DELETE", f"/models/{rolling.MODEL}/route")
    report.rows.append(["splits", f"{worst:.1f} standard deviations at most", "", ""])
    return worst <= 4


def main() -> int:
    """The exit status: 1 where anything was missed."""
    parser = argparse.ArgumentParser(description="Rollouts under load.")
    parser.add_argument("--parts", default="rollouts,kills,splits", help="names with commas")
    parts = parser.parse_args().parts.split(",")
    report = Report(
        "rollouts",
        "Rollouts under load, killed servers, splits",
        ("what", "ended as it should", "seconds", "requests that failed"),
        left=2,
    )
    texts = {
        f"{ROLLOUTS} rollouts end as they should, and nobody but a bad canary fails a request": (
            "rollouts",
            roll,
        ),
        f"after each of {KILLS} SIGKILLs the rollout goes on as the store has it": ("kills", kill),
        f"{SPLIT_REQUESTS:,} requests for each lane, with and without keys, within 4 deviations": (
            "splits",
            split,
        ),
    }
    is_met = True
    with tempfile.TemporaryDirectory() as folder:
        for i, (text, (part, measure)) in enumerate(texts.items()):
            if part not in parts:
                continue
            layers = LAYERS if measure is roll else rolling.LAYERS
            repository = rolling.make_repository(Path(folder) / str(i), layers=layers)
            if measure is split:
                place = repository / rolling.MODEL / "2"
                place.mkdir()
                (place / "model.onnx").write_bytes(rolling.version_bytes(GOOD, 2))
            begun_s = time.monotonic()
            met = measure(repository, report)
            report.target(text, met, f"{time.monotonic() - begun_s:.0f} s")
            is_met = is_met and met
    report.publish()
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
