"""Watches the model repository: what appears in it is served as the model's settings say.

The kernel tells of changes (inotify); nothing is polled. A model is read again a moment after the last
change of its folder, so that files that are still being copied are not taken for whole; whoever moves a
version's folder into place never shows half of one.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from watchfiles import Change, awatch

from gateway.control.models import ModelControl
from gateway.control.repository import is_model_name
from gateway.errors import GatewayError

log = logging.getLogger("gateway.control")

SETTLE_MS = 500
"""Time without a change after which a folder counts as whole."""

LONGEST_MS = 10_000
"""Time after which it is read although it still changes."""


async def watch(repository: Path, control: ModelControl) -> None:
    """Load models as they change, until this is cancelled."""
    root = await asyncio.to_thread(repository.resolve)

    def is_ours(_change: Change, path: str) -> bool:
        return not Path(path).relative_to(root).parts[0].startswith(".")

    async for changes in awatch(
        root, watch_filter=is_ours, debounce=LONGEST_MS, step=SETTLE_MS, rust_timeout=LONGEST_MS
    ):
        names = {Path(path).relative_to(root).parts[0] for _, path in changes}
        for name in sorted(names):
            if is_model_name(name) and await asyncio.to_thread((root / name).is_dir):
                try:
                    await control.perform("load", name)
                except GatewayError as error:
                    log.error("model '%s' changed: %s", name, error.message)
