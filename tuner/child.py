"""Evaluating in a child that can be killed: on a time-out, on too much memory, on a device error.

The child keeps the pipeline loaded between jobs; after a fault the next job gets a new one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from ditune.db.errors import EvaluationFault, UsageFault
from ditune.db.policy import Policy
from ditune.db.records import Hardware, Job, Origin, Software
from ditune.tuner.devices import require_alone
from ditune.tuner.evaluate import Case
from ditune.tuner.loading import Load, Plain
from ditune.tuner.verdict import Found

_LOOK_S = 0.25  # how often limits are looked at
_LOAD_S = 3600.0  # a large pipeline from a slow disk, or from the hub
_GIB = 1 << 30
_FOUND = TypeAdapter(Found)


@dataclass(frozen=True)
class Limits:
    """What a child may take; the time comes with each job."""

    host_bytes: int | None = None  # of memory that is its own alone
    device_bytes: int | None = None


class Child:
    """A runner in a process of its own; see `ditune.tuner.worker.Runner`."""

    def __init__(
        self,
        origin: Origin,
        *,
        device: str | None = None,
        limits: Limits | None = None,
        plain: Mapping[Case, np.ndarray] = MappingProxyType({}),
    ) -> None:
        """Start the child and wait until its pipeline is loaded.

        Args:
            origin: What it loads.
            device: Where to; by default where loading puts it.
            limits: Of its memory.
            plain: Plain videos of some cases, which it then need not generate.

        Raises:
            UsageFault: The pipeline cannot be loaded.
            EvaluationFault: The child died while it loaded.
        """
        self._limits = limits or Limits()
        self._folder = tempfile.TemporaryDirectory(prefix="ditune-")
        self._load = Load(
            origin=origin,
            device=device,
            device_bytes=self._limits.device_bytes,
            plain=tuple(self._written(case, video) for case, video in plain.items()),
        )
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except BaseException:
            self._folder.cleanup()
            raise

    def run(self, job: Job) -> Found:
        """Evaluate a policy in the child.

        Raises:
            EvaluationFault: It died, hung, or its device failed; the next job gets a new one.
            NotMeasurable: Other processes compute on the device.
        """
        if self._process is None:
            self._start()
        assert self._process is not None
        require_alone(self.device, self._process.pid)
        try:
            return _FOUND.validate_python(self._ask(job.model_dump_json(), job.limit_s))
        except _TooMuchMemory as fault:
            if job.policy == Policy():
                raise EvaluationFault(f"the plain pipeline does not run: {fault}") from None
            return Found((), unfit=str(fault))

    def stop(self) -> None:
        """Kill the child; a `run` that waits for it then raises."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the child for good."""
        self._end()
        self._folder.cleanup()

    # --- inside ----------------------------------------------------------------------------------

    def _written(self, case: Case, video: np.ndarray) -> Plain:
        file = Path(self._folder.name, f"{len(list(Path(self._folder.name).iterdir()))}.npy")
        np.save(file, video, allow_pickle=False)
        return Plain(prompt=case.prompt, seed=case.seed, file=str(file))

    def _end(self) -> None:
        """Kill the process, if there is one; the next job starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        self._said.close()

    def _start(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the child
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ditune.tuner.resident"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the parent, which ends it in order
        )
        try:
            ready = self._ask(self._load.model_dump_json(), _LOAD_S)
        except _TooMuchMemory as fault:
            raise UsageFault(f"the pipeline does not load: {fault}") from None
        self.device = str(ready["device"])
        self.hardware = Hardware.model_validate(ready["hardware"])
        self.software = Software.model_validate(ready["software"])

    def _ask(self, request: str, limit_s: float | None) -> dict[str, Any]:
        """Send a request and wait for the answer; whatever goes wrong ends the child."""
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(request.encode() + b"\n")
            answer = json.loads(self._line(process, limit_s))
        except BrokenPipeError:
            raise self._died(process) from None
        except BaseException:
            self._end()
            raise
        if "gave" in answer:
            gave: dict[str, Any] = answer["gave"]
            return gave
        self._end()
        if "refused" in answer:
            raise UsageFault(answer["refused"])
        raise EvaluationFault(answer["failed"])

    def _line(self, process: subprocess.Popen[bytes], limit_s: float | None) -> bytes:
        """Return the next line that a child writes, looking at its limits meanwhile."""
        assert process.stdout is not None
        ends = time.monotonic() + (float("inf") if limit_s is None else limit_s)
        line = b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([process.stdout], [], [], _LOOK_S)
            if readable:
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    raise self._died(process)
                line += part
                continue
            if time.monotonic() > ends:
                raise EvaluationFault(f"it took longer than {limit_s:.0f} s and was ended")
            self._look_at_memory(process.pid)
        return line

    def _look_at_memory(self, pid: int) -> None:
        most = self._limits.host_bytes
        if most is not None and (taken := own_bytes(pid)) > most:
            raise _TooMuchMemory(
                f"it needs more memory: it took {taken / _GIB:.1f} GiB and may take "
                f"{most / _GIB:.1f} GiB"
            )

    def _died(self, process: subprocess.Popen[bytes]) -> EvaluationFault:
        """Return what is known about the death of a child."""
        process.wait()
        code = process.returncode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().splitlines()
        self._end()
        said = f"; it said: {last[-1][:500]}" if last else ""
        return EvaluationFault(f"the process that evaluates was ended {how}{said}")


class _TooMuchMemory(Exception):
    """A child went beyond its limit; it is killed before anything else hears of it."""


def own_bytes(pid: int) -> int:
    """Return the memory that a process has for itself alone, also where it was swapped out.

    Files that are mapped, such as weights, are left out: the system can drop them at any time. 0
    where there is no /proc.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    sizes = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return 1024 * sum(int(sizes.get(name, "0").split()[0]) for name in ("RssAnon", "VmSwap"))
