"""The life of a version: which state may follow which."""

from __future__ import annotations

from gateway.serving.routes import VersionState

_MOVES = {
    VersionState.LOADING: {
        VersionState.WARMING,
        VersionState.READY,
        VersionState.FAILED,
        VersionState.UNLOADING,
    },
    VersionState.WARMING: {VersionState.READY, VersionState.FAILED, VersionState.UNLOADING},
    VersionState.READY: {VersionState.FAILED, VersionState.UNLOADING},
    VersionState.FAILED: {VersionState.UNLOADING},
    VersionState.UNLOADING: {VersionState.UNLOADED},
    VersionState.UNLOADED: set[VersionState](),
}


def check_move(old: VersionState, new: VersionState) -> None:
    """RuntimeError where `new` may not follow `old`."""
    if new not in _MOVES[old]:
        raise RuntimeError(f"a version cannot go from {old.name} to {new.name}")
