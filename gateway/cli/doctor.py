"""``gateway doctor``: looks at the installation, the machine and a model repository; says what is wrong."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from gateway.cli import doctor_facts, doctor_findings
from gateway.cli.doctor_facts import Facts
from gateway.cli.doctor_findings import Finding, in_bytes, name_of
from gateway.control import inspection
from gateway.control.inspection import Load, Survey
from gateway.errors import ConfigurationError
from gateway.settings import ServerSettings, load_server_settings
from gateway.tensors import TensorSpec

PLAIN_COLUMNS = 100
"""Width of the screen where there is no terminal that has one."""

LEAST_COLUMNS = 20
"""Of a text, however narrow the terminal."""

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was found. ``repository`` is None where none was looked at."""

    facts: Facts
    repository: Path | None
    survey: Survey
    loads: tuple[Load, ...]
    findings: tuple[Finding, ...]

    @property
    def has_errors(self) -> bool:
        """Whether a server would not start, or not serve a model."""
        return any(finding.severity == "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain values, by the keys that the command's help describes."""
        return {
            "ok": not self.has_errors,
            **asdict(self.facts),
            "repository": None if self.repository is None else str(self.repository),
            "models": [_load_as_json(load) for load in self.loads],
            "ignored": list(self.survey.ignored),
            "findings": [asdict(finding) for finding in self.findings],
        }


def run(repository: Path | None, config: str | None, *, is_json: bool) -> int:
    """Look at everything and print it; the exit status: 1 where there are errors, else 0.

    Args:
        repository: the model repository; None: installation and machine alone.
        config: the server's settings file, as for ``gateway serve``.
        is_json: print one JSON object instead of a screen.
    """
    logging.getLogger("gateway").addHandler(logging.NullHandler())  # all of it is in the report
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_COLUMNS)
    report = examine(repository, config, Console(quiet=True) if is_json else console)
    if is_json:
        print(json.dumps(report.as_json(), indent=2))  # noqa: T201
    else:
        show(report, console)
    return int(report.has_errors)


def _exit(number: int, _frame: object) -> NoReturn:
    """End as an exception does, so that a worker that is loading a model is ended, too."""
    sys.exit(128 + number)


def examine(repository: Path | None, config: str | None, console: Console) -> Report:
    """Find everything out. Models are loaded one after the other; the console shows which."""
    with console.status("looking at the installation…"):
        facts = doctor_facts.collect()
    findings = list(doctor_findings.of_installation(facts))
    survey = Survey((), (), (), ())
    loads: list[Load] = []
    if repository is not None:
        survey = inspection.survey(repository)
        findings += doctor_findings.of_repository(survey)
        try:
            server = load_server_settings(model_repository=repository, config=config)
        except ConfigurationError as error:
            advice = "correct it: a server does not start with it"
            findings.append(Finding("error", "settings", error.message, advice))
        else:
            if facts.runtime.onnxruntime is not None and facts.kernels.error is None:
                loads = _load_all(survey, server, console)
            budget = server.memory_bytes
            findings += doctor_findings.of_loads(loads, facts.limits, budget)
    order = list(_STYLES)
    findings.sort(key=lambda finding: order.index(finding.severity))
    return Report(facts, repository, survey, tuple(loads), tuple(findings))


def _load_all(survey: Survey, server: ServerSettings, console: Console) -> list[Load]:
    loads = []
    for entry, version in survey.chosen:
        for instance in entry.settings.instances:
            with console.status(f"loading {entry.name} version {version.version}…"):
                loads.append(inspection.load(entry, version, instance, server))
    return loads


def _load_as_json(load: Load) -> dict[str, Any]:
    signature, understood = load.signature, load.understanding
    return {
        "model": load.entry.name,
        "version": load.version,
        "device": load.instance.device,
        "workers": load.instance.count,
        "threads": load.threads,
        "state": "loaded" if understood else "failed",
        "reason": load.reason,
        "detail": load.detail,
        "seconds": round(load.seconds, 3),
        "memory_bytes": understood.resident_bytes if understood else None,
        "max_batch_size": signature.max_batch_size if signature else None,
        "batching": understood.batching if understood else None,
        "output_transport": understood.outputs if understood else None,
        "notes": list(understood.notes) if understood else [],
        "inputs": [spec.to_wire() for spec in signature.inputs] if signature else [],
        "outputs": [spec.to_wire() for spec in signature.outputs] if signature else [],
    }


def show(report: Report, console: Console) -> None:
    """Print the screen."""
    facts = report.facts
    _section(console, f"inference-gateway {facts.runtime.gateway}", _installation_rows(facts))
    _section(console, "Machine", _machine_rows(facts))
    if report.repository is not None:
        console.print(Text(_plain(f"Models in {report.repository}"), "bold"), soft_wrap=True)
        for load in report.loads:
            _show_load(console, load)
        if not report.loads:
            console.print("  none was loaded", style="dim")
        console.print()
    if report.survey.ignored:
        _section(console, "Ignored", [("", reason) for reason in report.survey.ignored])
    _show_findings(console, report.findings)


def _installation_rows(facts: Facts) -> list[tuple[str, str]]:
    runtime, kernels = facts.runtime, facts.kernels
    onnx = "not usable"
    if runtime.onnxruntime is not None:
        brought_by = " and ".join(runtime.onnxruntime_distributions) or "unknown"
        providers = ", ".join(runtime.execution_providers)
        onnx = f"{runtime.onnxruntime}, from {brought_by}: {providers}"
    parser = "C" if runtime.aiohttp_c_parser else "Python"
    return [
        ("Python", f"{runtime.python}, {runtime.system}"),
        ("ONNX Runtime", onnx),
        ("", "\n".join(runtime.execution_devices)),
        ("aiohttp", f"{runtime.aiohttp}, parser in {parser}" if runtime.aiohttp else "missing"),
        ("uvloop", runtime.uvloop or "missing"),
        (
            "kernels",
            f"{kernels.build} build, layout {kernels.layout}, in {kernels.folder}"
            if kernels.build
            else f"do not load from {kernels.folder}",
        ),
    ]


def _machine_rows(facts: Facts) -> list[tuple[str, str]]:
    limits, devices = facts.limits, facts.devices
    cpus = f"{limits.cpus_usable} of {limits.cpus_machine} usable"
    if limits.cpus_affinity < limits.cpus_machine:
        cpus += f", by affinity {limits.cpus_affinity}"
    if limits.cpus_usable < limits.cpus_affinity:
        cpus += ", limited by a cgroup"
    memory = f"{in_bytes(limits.memory_usable_bytes)} usable"
    if limits.memory_usable_bytes < limits.memory_machine_bytes:
        memory += f" of {in_bytes(limits.memory_machine_bytes)}, limited by a cgroup"
    soft, hard = (
        "no limit" if limit is None else f"{limit:,}"
        for limit in (limits.open_files_soft, limits.open_files_hard)
    )
    working = {True: "works", False: "does not work"}
    return [
        (
            "CPU",
            f"{devices.cpu}: {', '.join(devices.cpu_features) or 'no vector extensions known'}",
        ),
        ("CPUs", cpus),
        ("NVIDIA", ", ".join(devices.nvidia) or "no GPU"),
        ("memory", memory),
        ("open files", soft if soft == hard else f"{soft}, can be raised to {hard}"),
        (
            "kernel",
            f"sealing of memfds {working[limits.memfd_sealing]}, pidfd_open {working[limits.pidfd]}",
        ),
    ]


def _show_load(console: Console, load: Load) -> None:
    instance, understood, signature = load.instance, load.understanding, load.signature
    workers = "1 worker" if instance.count == 1 else f"{instance.count} workers"
    threads = "1 thread" if load.threads == 1 else f"{load.threads} threads"
    title = Text("  ").append(_plain(name_of(load)), "bold")
    title.append(f"  {instance.device}, {workers}, {threads}  ", "dim")
    if signature is None or understood is None:
        console.print(title.append("FAILED", "bold red").append(f" after {load.seconds:.1f} s"))
        rows = [("reason", load.reason), ("detail", load.detail)]
    else:
        took = f"loaded in {load.seconds:.1f} s, {in_bytes(understood.resident_bytes)} of memory"
        console.print(title.append(took, "green"))
        rows = [
            ("inputs", "\n".join(map(_tensor, signature.inputs)) or "none"),
            ("outputs", "\n".join(map(_tensor, signature.outputs))),
            ("batching", understood.batching),
            ("transport", f"outputs are {understood.outputs}"),
            *(("note", note) for note in understood.notes),
        ]
    _print_rows(console, 4, rows)


def _tensor(spec: TensorSpec) -> str:
    if spec.shape is None:
        shape = "of any rank"
    else:
        shape = f"[{', '.join('?' if dim is None else str(dim) for dim in spec.shape)}]"
    return _plain(f"{spec.name} {spec.datatype.name} {shape}{' optional' * spec.optional}")


def _show_findings(console: Console, findings: Sequence[Finding]) -> None:
    if not findings:
        console.print(Text("No problems found.", "bold green"))
        return
    counts = {name: sum(f.severity == name for f in findings) for name in _STYLES}
    words = [f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count]
    console.print(Text(f"Findings: {', '.join(words)}", "bold"))
    for finding in findings:
        label = Text(finding.severity.ljust(max(map(len, _STYLES))), _STYLES[finding.severity])
        problem = Text(_plain(f"{finding.about}: "), "bold")
        problem.append(_plain(finding.problem), "not bold")
        _print_row(console, 2, label, problem)
        _print_row(console, 2, Text(" " * len(label)), Text(_plain(f"→ {finding.advice}"), "dim"))


def _section(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    console.print(Text(title, "bold"))
    _print_rows(console, 2, rows)
    console.print()


def _print_rows(console: Console, indent: int, rows: Sequence[tuple[str, str]]) -> None:
    """Labels and texts in two columns; a row without text is left out."""
    width = max((len(label) for label, _text in rows), default=0)
    for label, text in rows:
        for at, line in enumerate(text.split("\n") if text else ()):
            name = "" if at else label
            _print_row(console, indent, Text(name.ljust(width), "dim"), Text(_plain(line)))


def _print_row(console: Console, indent: int, label: Text, text: Text) -> None:
    """One row, its text wrapped in its own column; a table would fill the lines up with blanks."""
    head = Text(" " * indent).append(label).append("  " * bool(label))
    for line in text.wrap(console, max(LEAST_COLUMNS, console.width - len(head))):
        line.rstrip()
        console.print(head.copy().append(line), soft_wrap=True)
        head = Text(" " * len(head))


def _plain(text: str) -> str:
    """Text on one line; what a model's file says cannot steer the terminal."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
