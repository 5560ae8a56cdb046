"""How models, labels and versions may be called, wherever a name is read."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Of models and labels, to be matched in full; also of what error texts may repeat."""

MAX_VERSION = (1 << 63) - 1
"""Highest version of a model: int64, as in the protocols."""
