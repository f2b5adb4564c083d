"""The digest of the kernels' sources: a tuning holds for the kernels that it was found with."""

from __future__ import annotations

import functools
from pathlib import Path

from ditune.db.digest import digest_bytes

DECIDING = ("cpu_*.py", "launch.py", "routing*.py", "task_map.py", "triton_*.py", "variants.py")


@functools.cache
def kernels_digest(folder: Path | None = None) -> str:
    """Return the digest of the sources that decide how fast a configuration is, "sha256:...".

    What predicts, searches or compiles ahead is not among them.

    Args:
        folder: Where they lie; by default where this file does.
    """
    folder = folder or Path(__file__).parent
    files = sorted(path for pattern in DECIDING for path in folder.glob(pattern))
    contents = [path.name.encode() + b"\0" + path.read_bytes() for path in files]
    return digest_bytes(b"\0".join(contents))
