"""A version's model file as the supervisor sees it: where it leads, and whether it is still the same.

Repositories change beneath a server: what was a file when a version was loaded may be a link out of the
repository, another file or nothing when one of its workers has to be replaced.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from gateway.errors import LoadError

CHANGED = "its file changed since it was loaded: a version's content is immutable"


class ModelFile:
    """The file of one version, from its first load on.

    Args:
        path: ``<repository>/<model>/<version>/model.onnx``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int, int, int] | None = None

    def check(self) -> int:
        """Whether a worker may load it; gives its size in bytes.

        The first call settles which file it is: device, inode, size and time of change. External data
        is not looked at.

        Raises:
            OSError: it cannot be opened, which may be otherwise in a while.
            LoadError: it leads out of the repository, is no file, or another one than it was.
        """
        try:
            target = self.path.resolve(strict=True)
            root = self.path.parents[2].resolve(strict=True)
        except RuntimeError:
            raise LoadError("the model file is behind symbolic links in a circle") from None
        if not target.is_relative_to(root):
            raise LoadError("the model file leads out of the model repository")
        # A named pipe must not block.
        descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise LoadError("the model file is not a regular file")
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._identity is None:
            self._identity = identity
        elif identity != self._identity:
            raise LoadError(CHANGED)
        return status.st_size
