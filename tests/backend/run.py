"""Serve the onnx package's own backend tests and compare every answer with ONNX Runtime's own.

    python tests/backend/run.py [--kind node …] [--only NAME …] [--sample] [--write FILE]

Each case is run directly first, which says what the gateway must do with it (`direct.Sort`). What ONNX
Runtime runs must be READY and come back through the binary encoding, msgpack and, where every datatype
has a form there, JSON: names, datatypes and shapes exactly, values within the case's own tolerance of the
direct result (not bit for bit: the order of a sum may depend on how its memory is aligned; the table
says how many were equal bit for bit). What it refuses, or what no request of v2 could carry, must be
UNAVAILABLE for that very reason. What fails on its data must do so in the gateway.

Exit status 1 if anything is otherwise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import requests

from gateway.client import Client
from gateway.errors import GatewayError, InferenceFailed
from tests.backend.cases import KINDS, Arrays, Case, cases, load_arrays, sample
from tests.backend.direct import SERVED, Sort, Verdict, bits, classify, difference, form_difference
from tests.system.server import Server

CHUNK = 40
"""Models served at a time: each has a worker process."""

SAMPLE = 300
"""Cases in the fixed sample."""

DEADLINE_S = 30

ENCODINGS = ("binary", "msgpack", "json")

_NOT_IN_JSON = {"float16", "bfloat16"}


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a case: ``problem`` is empty where all is as it should be.

    ``is_exact``: served, and every answer was equal to the direct result bit for bit.
    """

    case: Case
    verdict: Verdict
    problem: str
    is_exact: bool


def check(chunk: list[Case]) -> list[Result]:
    """Serve cases by a server of their own; the result of each."""
    with tempfile.TemporaryDirectory(prefix="backend-") as folder:
        models, data = Path(folder) / "models", Path(folder) / "data"
        for case in chunk:
            case.write(models / case.model_name / "1", data / case.model_name)
        verdicts = classify(chunk, models, data)
        with Server(models, "--no-exit-on-error") as server, ExitStack() as stack:
            clients = [
                stack.enter_context(
                    Client(server.url, encoding=encoding, retries=0, timeout_s=DEADLINE_S)
                )
                for encoding in ENCODINGS
            ]
            states = _states(server.url)
            return [
                _check(case, verdicts[case.model_name], *states[case.model_name], data, clients)
                for case in chunk
            ]


def chunks(found: list[Case], size: int = CHUNK) -> Iterator[list[Case]]:
    """The cases in runs of at most ``size``."""
    for start in range(0, len(found), size):
        yield found[start : start + size]


def _states(url: str) -> dict[str, tuple[str, str]]:
    """Each model's state and the reason of it."""
    index = requests.post(f"{url}/v2/repository/index", timeout=DEADLINE_S).json()
    return {entry["name"]: (entry["state"], entry.get("reason", "")) for entry in index}


def _check(
    case: Case, verdict: Verdict, state: str, reason: str, data: Path, clients: list[Client]
) -> Result:
    folder = data / case.model_name
    if verdict.sort in SERVED and state == "READY":
        comparisons = list(_compare(case, verdict.sort, folder, clients))
        problem = next((text for text, _ in comparisons if text), "")
        problem = problem if comparisons else "nothing was compared: it has no data"
        return Result(case, verdict, problem, all(exact for _, exact in comparisons))
    if verdict.sort is Sort.FAILING and state == "READY":
        return Result(case, verdict, _expect_failure(case, folder, clients[0]), False)
    if state != "UNAVAILABLE" or verdict.sort in SERVED:
        problem = f"it is {state} ({reason}), expected: {verdict.sort} {verdict.reason}"
    elif verdict.reason not in reason:
        problem = f"refused for another reason ({reason}), expected: {verdict.reason}"
    else:
        problem = "the reason shows a path" if str(data.parent) in reason else ""
    return Result(case, verdict, problem, False)


def _compare(
    case: Case, sort: Sort, folder: Path, clients: list[Client]
) -> Iterator[tuple[str, bool]]:
    """Send every data set in every encoding; for each what is wrong and whether it is exact."""
    for inputs_folder in sorted(folder.glob("inputs_*")):
        inputs = load_arrays(inputs_folder)
        expected = load_arrays(folder / inputs_folder.name.replace("inputs", "direct"))
        for encoding, client in zip(ENCODINGS, clients, strict=True):
            is_json = encoding == "json"
            types = {array.dtype.name for array in (*inputs.values(), *expected.values())}
            if is_json and types & _NOT_IN_JSON:
                continue
            try:
                outputs = client.infer(case.model_name, inputs).outputs
            except GatewayError as error:
                yield f"{encoding}: {type(error).__name__}: {error}", False
                continue
            problem = _outputs_difference(case, sort, outputs, expected)
            yield problem and f"{encoding}: {problem}", _is_exact(outputs, expected, is_json)


def _outputs_difference(case: Case, sort: Sort, outputs: Arrays, expected: Arrays) -> str:
    if list(outputs) != list(expected):
        return f"the outputs are {list(outputs)}, expected {list(expected)}"
    for name, array in expected.items():
        if sort is Sort.RANDOM:
            problem = form_difference(outputs[name], array)
        else:
            problem = difference(outputs[name], array, case.rtol, case.atol)
        if problem:
            return f"output '{name}': {problem}"
    return ""


def _is_exact(outputs: Arrays, expected: Arrays, is_json: bool) -> bool:
    """Whether all bits are the same; in JSON there is but one NaN."""
    return outputs.keys() == expected.keys() and all(
        bits(outputs[name], one_nan=is_json) == bits(array, one_nan=is_json)
        for name, array in expected.items()
    )


def _expect_failure(case: Case, folder: Path, client: Client) -> str:
    """What is wrong with how the model fails on its data."""
    for inputs in map(load_arrays, folder.glob("inputs_*")):
        try:
            client.infer(case.model_name, inputs)
        except InferenceFailed:
            continue
        except GatewayError as error:
            return f"failed otherwise ({type(error).__name__}: {error})"
        return "answered, where ONNX Runtime fails"
    return ""


def report(results: list[Result]) -> str:
    """The results as Markdown."""
    versions = (f"{package} {version(package)}" for package in ("onnx", "onnxruntime"))
    refused = Counter(
        f"- {r.verdict.sort}: `{r.verdict.reason}`: "
        for r in results
        if r.verdict.sort not in SERVED and not r.problem
    )
    lines = [
        f"{len(results)} backend tests, {', '.join(versions)}",
        "",
        *_table(results),
        "",
        "Not served, for a reason that holds:",
        "",
        *(f"{text}{count}" for text, count in sorted(refused.items())),
        "",
        "Not as it should be:",
        "",
        *(failures(results) or ["- none"]),
    ]
    return "\n".join(lines)


def _table(results: list[Result]) -> list[str]:
    heads = ["kind", "cases", *Sort, "equal bit for bit", "not as it should be"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    kinds = sorted({result.case.kind for result in results}, key=KINDS.index)
    for kind in [*kinds, None]:
        of_kind = [r for r in results if kind in (None, r.case.kind)]
        sorts = Counter(r.verdict.sort for r in of_kind if not r.problem)
        served = sorts[Sort.SERVED] + sorts[Sort.WRONG]
        exact = sum(r.is_exact for r in of_kind if not r.problem)
        wrong = sum(bool(r.problem) for r in of_kind)
        counts = [len(of_kind), *(sorts[sort] for sort in Sort), f"{exact} of {served}", wrong]
        lines.append(f"| {kind or 'all'} | " + " | ".join(map(str, counts)) + " |")
    return lines


def failures(results: Iterable[Result]) -> list[str]:
    """A line for each case that is not as it should be."""
    return [f"- {r.case.kind}/{r.case.name}: {r.problem}" for r in results if r.problem]


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--only", metavar="NAME", nargs="+", help="only the cases of these names")
    parser.add_argument("--sample", action="store_true", help=f"the fixed sample of {SAMPLE}")
    parser.add_argument("--write", metavar="FILE", type=Path, help="write the table there, too")
    options = parser.parse_args()
    chosen = cases(options.kind)
    if options.only:
        chosen = [case for case in chosen if case.name in options.only]
    if options.sample:
        chosen = sample(chosen, SAMPLE)
    if not chosen:
        parser.error("no case is named so")
    results: list[Result] = []
    for chunk in chunks(chosen):
        found = check(chunk)
        results += found
        print(f"{len(results)} of {len(chosen)}", *failures(found), sep="\n", file=sys.stderr)
    text = report(results)
    print(text)
    if options.write:
        options.write.write_text(text + "\n")
    return 1 if failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())
