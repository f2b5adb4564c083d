"""Writing a file so that a reader sees the old one or the new one, never half of it."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path

from ditune.db.errors import DituneError, StoreFault, UsageFault

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name in the same folder, make it durable, and rename it.

    Raises:
        UsageFault: The folder does not exist or cannot be written, or `path` is a folder.
        StoreFault: The disk is full or failing; an older file of that name is intact.
    """
    hidden = path.parent / f".ditune-{uuid.uuid4().hex}.tmp"
    try:
        # not tempfile: it makes files that only their owner can read, whatever the umask says
        with os.fdopen(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            hidden.unlink(missing_ok=True)
        raise _fault(path, error) from error


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fault(path: Path, error: OSError) -> DituneError:
    reason = error.strerror or str(error)
    if error.errno in _NO_ROOM:
        return StoreFault(
            f"{path} could not be written: {reason}; free some space and run the command again"
        )
    return UsageFault(
        f"{path} cannot be written: {reason}; name a file in a folder that exists and is writable"
    )
