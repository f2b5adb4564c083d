"""One generation under one setting of one peer: counted or timed, and never run twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ditune.db.errors import DituneError
from ditune.profiler.work import WorkCounter
from ditune.tuner.evaluate import Case, Evaluator
from ditune.tuner.measurements import Kind, Measurement, Measurements
from ditune.tuner.peers.contract import Setting

PLAIN = "plain"


class PeerFault(DituneError):
    """A peer does not run here; the message is its own."""

    exit_code = 1


@contextmanager
def _untouched(_pipe: Any) -> Iterator[Mapping[str, Any]]:
    yield {}


PLAIN_SETTING = Setting(PLAIN, _untouched)


@contextmanager
def foreign(peer: str) -> Iterator[None]:
    """Turn whatever a peer's own code raises into one sentence: its crash is a result, not ours."""
    try:
        yield
    except DituneError:
        raise
    except Exception as fault:  # the edge to libraries that are not ours
        first = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise PeerFault(f"{peer} crashed: {type(fault).__name__}: {first}") from fault


class Runs:
    """Generations of one source, kept by setting and case."""

    def __init__(self, evaluator: Evaluator, log: Measurements) -> None:
        """Take up what the log holds."""
        self._evaluator = evaluator
        self._log = log

    def counted(self, peer: str, setting: Setting, case: Case) -> Measurement:
        """Return a generation with the operations that it took."""
        return self._one("counted", peer, setting, case)

    def timed(self, peer: str, setting: Setting, case: Case) -> Measurement:
        """Return a generation with its latency."""
        return self._one("timed", peer, setting, case)

    def timed_in_turn(
        self,
        settings: Sequence[tuple[str, Setting]],
        cases: Sequence[Case],
        progress: Callable[[str], None],
    ) -> None:
        """Time settings of peers and the plain pipeline on each case, in an order drawn anew."""
        for index, case in enumerate(cases):
            order = [(PLAIN, PLAIN_SETTING), *settings]
            random.Random(case.seed).shuffle(order)
            for peer, setting in order:
                progress(f"held-out video {index + 1} of {len(cases)}: {peer}")
                self.timed(peer, setting, case)

    def _one(self, kind: Kind, peer: str, setting: Setting, case: Case) -> Measurement:
        def take() -> Measurement:
            evaluator = self._evaluator
            evaluator.plain(case)  # before the peer is on
            flops, lasted = None, None
            with foreign(peer), setting.on(evaluator.source.pipe) as changes:
                if kind == "counted":
                    with WorkCounter() as counter:
                        video = evaluator.generate(case, changes)[0]
                    flops = counter.flops
                else:
                    video, lasted = evaluator.generate(case, changes)
            values = evaluator.values(video, case)
            return Measurement(
                kind, peer, setting.label, case.prompt, case.seed, values, flops, lasted
            )

        return self._log.get(kind, peer, setting.label, case, take)
