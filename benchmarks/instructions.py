"""Instructions that pieces of a Python program take, counted by valgrind.

A count does not depend on what else the machine does. `counted` runs a module under callgrind, some
fifty times slower; the module brackets the pieces with `Counter`. Needs valgrind with its headers,
and a C compiler.

valgrind emulates fused multiply-adds value by value, four hundred times slower than they are.
Without them matrix products take more instructions than they would.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

_REQUESTS = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void stop(void) { CALLGRIND_STOP_INSTRUMENTATION; }
void dump(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
"""
_PIECE = re.compile(r"^desc: Trigger: Client Request: (.+)$", re.MULTILINE)
_TOTAL = re.compile(r"^totals: (\d+)", re.MULTILINE)
_BETWEEN = "between"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
_UNFUSED = {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}


class Counter:
    """Counts pieces of this process; what runs between them is not counted, and less slow."""

    def __init__(self, folder: Path) -> None:
        """Compile the requests that valgrind listens to."""
        source, library = folder / "requests.c", folder / "requests.so"
        source.write_text(_REQUESTS)
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
        self._requests = ctypes.CDLL(str(library))

    @contextmanager
    def piece(self, name: str) -> Iterator[None]:
        """Count what runs in the block."""
        gc.collect()
        self._requests.start()
        self._requests.dump(_BETWEEN.encode())
        yield
        self._requests.dump(name.encode())
        self._requests.stop()


def counted(module: str, *arguments: str, fused: bool) -> dict[str, int]:
    """Run `python -m MODULE FOLDER ARGUMENTS` under callgrind; return its pieces' instructions.

    Args:
        module: Makes its `Counter` in the folder that it is given.
        arguments: Its others.
        fused: Whether matrix products may use fused multiply-adds.

    Raises:
        SystemExit: There is no valgrind or no C compiler, or the module failed.
    """
    missing = [name for name in ("valgrind", "cc") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"counting instructions needs {' and '.join(missing)}: not found")
    environment = os.environ | _ONE_THREAD | ({} if fused else _UNFUSED)
    with TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--error-limit=no", "-q"]
        command += [f"--callgrind-out-file={folder}/counts", sys.executable, "-m", module, folder]
        status = subprocess.run([*command, *arguments], env=environment, check=False).returncode
        if status:
            raise SystemExit(f"{module} failed under valgrind, with status {status}")
        return _pieces(Path(folder))


def _pieces(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in folder.glob("counts.*"):
        text = path.read_text()
        piece, total = _PIECE.search(text), _TOTAL.search(text)
        if piece and total and piece[1] != _BETWEEN:
            found[piece[1]] = int(total[1])
    return found
