"""The child that evaluates: `python -m ditune.tuner.resident`, one per device, driven by a `Child`.

It loads a pipeline once and stays. Each line that it reads is one JSON object, and so is each line
that it writes; nothing else passes between the two processes, and nothing is ever unpickled. It
ends with its parent, whatever ends that.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TextIO

import numpy as np
import torch

from ditune.accel.fingerprint import detect
from ditune.db.errors import EvaluationFault, UsageFault
from ditune.db.records import Constraint, Job
from ditune.tuner.evaluate import Case, Evaluator
from ditune.tuner.here import Here
from ditune.tuner.loading import Load
from ditune.tuner.source import load_origin

_PR_SET_PDEATHSIG = 1


class Resident:
    """What the child holds: a pipeline, and its plain videos for each set of floors."""

    def load(self, line: str) -> dict[str, Any]:
        """Load a pipeline; return what it runs on and with, to compare with the study's."""
        asked = Load.model_validate_json(line)
        if asked.device_bytes is not None and torch.cuda.is_available():
            total = torch.cuda.get_device_properties(asked.device or 0).total_memory
            share = min(1.0, asked.device_bytes / total)
            torch.cuda.set_per_process_memory_fraction(share, asked.device or 0)
        self._source = source = load_origin(asked.origin, asked.device)
        self._plain = {
            Case(p.prompt, p.seed): np.load(p.file, allow_pickle=False) for p in asked.plain
        }
        self._here: dict[tuple[Constraint, ...], Here] = {}
        hardware, software, _ = detect(source.pipe, source.call, source.small)
        return {
            "device": self._runner(()).device,
            "hardware": hardware.model_dump(mode="json"),
            "software": software.model_dump(mode="json"),
        }

    def run(self, line: str) -> dict[str, Any]:
        """Do a job."""
        job = Job.model_validate_json(line)
        return asdict(self._runner(job.constraints).run(job))

    def _runner(self, constraints: tuple[Constraint, ...]) -> Here:
        if constraints not in self._here:
            evaluator = Evaluator(self._source, constraints)
            evaluator.know(self._plain)
            self._here[constraints] = Here(evaluator)
        return self._here[constraints]


def main() -> None:
    """Answer requests until there are no more, or until one failed."""
    answers = _private_output()
    _end_with_parent()
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    resident = Resident()
    work = resident.load
    for line in sys.stdin:
        answer = _answer(work, line)
        print(json.dumps(answer, allow_nan=False), file=answers, flush=True)
        if "gave" not in answer:
            return
        work = resident.run


def _answer(work: Callable[[str], dict[str, Any]], line: str) -> dict[str, Any]:
    """Return what some work gave, or what went wrong, as the parent reads it."""
    try:
        return {"gave": work(line)}
    except UsageFault as fault:
        return {"refused": str(fault)}
    except EvaluationFault as fault:
        return {"failed": str(fault)}
    except Exception as fault:  # the edge of this process: the parent makes an error of it
        return {"failed": f"{type(fault).__name__}: {fault}"}


def _private_output() -> TextIO:
    """Keep standard output for answers: what libraries print goes to standard error."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w", encoding="utf-8")


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, also in the middle of a generation.

    Elsewhere it ends at the next read, because its standard input is closed then.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # it died before that
            sys.exit(1)


if __name__ == "__main__":
    main()
