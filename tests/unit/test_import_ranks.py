"""Imports point strictly down (docs/architecture.md, "The ranks")."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "gateway"

RANKS = {
    "errors": -2,  # every module may raise
    "names": -1,
    "yamlfile": -1,  # what settings are read from
    "settings": 0, "clock": 0, "tensors": 0, "bytestrings": 0, "_kernels": 0,
    "telemetry": 1, "protocols": 1, "client": 1, "security": 1, "store": 1,
    "serving": 2, "rollout": 3,
    "frontend": 4, "control": 4,
    "admin": 5, "app": 6, "cli": 7, "__main__": 8,
}  # fmt: skip

PRIVATE_TO = {
    "onnxruntime": {"gateway.serving.session"},
    "aiohttp": {
        "gateway.frontend",
        "gateway.control",
        "gateway.admin",
        "gateway.cli",
        "gateway.client",
    },
    "pydantic": {"gateway.settings", "gateway.rollout", "gateway.admin"},
    "sqlalchemy": {"gateway.store"},
    "alembic": {"gateway.store"},
    "pickle": set(),
    "multiprocessing": set(),
}
"""Who alone may import a library: a prefix of the importing module's name."""


def modules() -> list[tuple[str, Path]]:
    return [
        (".".join(("gateway", *path.relative_to(PACKAGE).with_suffix("").parts)), path)
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def imports_of(path: Path) -> set[str]:
    """Dotted names that a module imports, wherever in it, but for type checking only."""
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def part_of(dotted: str) -> str:
    """The package or module right below gateway; empty for gateway itself."""
    return [*dotted.split("."), ""][1]


@pytest.mark.parametrize(
    ("module", "path"), modules(), ids=lambda v: str(v) if "." in str(v) else ""
)
def test_imports_point_down(module: str, path: Path):
    part = part_of(module)
    if part in ("", "__init__"):
        return  # gateway/__init__.py holds the version alone
    for imported in imports_of(path):
        if not imported.startswith("gateway."):
            continue
        other = part_of(imported)
        if other in (part, "__version__"):
            continue
        assert RANKS[other] < RANKS[part], f"{module} imports {imported}"


@pytest.mark.parametrize("library", PRIVATE_TO)
def test_libraries_are_imported_where_they_belong(library: str):
    for module, path in modules():
        if any(name.split(".")[0] == library for name in imports_of(path)):
            assert any(module.startswith(owner) for owner in PRIVATE_TO[library]), module


def test_a_worker_process_loads_neither_http_nor_settings(run_python):
    """The worker's real closure, not only its own import lines."""
    code = "import sys, gateway.serving.worker; print(*sys.modules)"
    loaded = set(run_python(code).split())
    assert "onnxruntime" in loaded
    assert loaded.isdisjoint({"aiohttp", "pydantic", "gateway.control", "gateway.frontend"})


def test_the_front_end_does_not_load_onnxruntime(run_python):
    code = "import sys, gateway.frontend.server; print(*sys.modules)"
    assert "onnxruntime" not in run_python(code).split()
