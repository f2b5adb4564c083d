"""A folder of measurements goes on only with what it was begun with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ditune.db.errors import UsageFault
from ditune.db.files import write_atomically
from ditune.miniature.system import WEIGHTS

_NAME = "measures.json"


def require_same(folder: Path, settings: Mapping[str, object]) -> None:
    """Write what a folder's measurements are of, or compare with what it says.

    The miniature's weights count always.

    Args:
        folder: Of the benchmark; it must exist.
        settings: What measurements depend on besides, as JSON holds it.

    Raises:
        UsageFault: The folder was begun with something else.
    """
    path = folder / _NAME
    now: dict[str, object] = {"weights": _weights(), **settings}
    if not path.exists():
        write_atomically(path, json.dumps(now, indent=1).encode() + b"\n")
        return
    then = json.loads(path.read_text(encoding="utf-8"))
    differing = sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k))
    if differing:
        raise UsageFault(
            f"{folder} was begun with other {', '.join(differing)}: move it away to begin anew"
        )


def _weights() -> str:
    """Return a digest of everything that the miniature loads."""
    found = hashlib.sha256()
    for path in sorted(WEIGHTS.rglob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
