"""What the judge says of the miniature's videos, made many at once on any device, and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from ditune.accel.apply import accelerate
from ditune.db.policy import AdaptiveHandoff, Policy, RuleCache
from ditune.miniature.classifier import ATTRIBUTES, hits, trained_judge
from ditune.miniature.system import MiniatureSource
from ditune.tuner.evaluate import Case
from ditune.tuner.measurements import Measurement, Measurements

_BY = "judge"
_TOGETHER = {"cpu": 20, "cuda": 200}  # videos of one call

Difference = Mapping[str, float]


class Judged:
    """The judge's word on videos under policies, against the plain video of each case."""

    def __init__(
        self,
        source: MiniatureSource,
        log: Measurements,
        device: str,
        say: Callable[[str], None],
    ) -> None:
        """Take up what the log holds; pipeline and small model move to the device."""
        assert source.small is not None
        torch.backends.cudnn.allow_tf32 = False
        source.pipe.to(device)
        source.small.to(device)
        self._source = source
        self._log = log
        self._together = _TOGETHER[device]
        self._say = say

    def prepare(self, cases: Sequence[Case]) -> None:
        """Judge the plain videos of all cases at once."""
        self._right(Policy(), cases)

    def differences(self, policy: Policy, cases: Sequence[Case]) -> list[Difference]:
        """Return for each attribute whether it is right under the policy, minus whether plain."""
        plain, tuned = self._right(Policy(), cases), self._right(policy, cases)
        return [
            {name: own[name] - other[name] for name in own}
            for own, other in zip(tuned, plain, strict=True)
        ]

    def _right(self, policy: Policy, cases: Sequence[Case]) -> list[Mapping[str, float]]:
        missing = [case for case in cases if self._find(policy, case) is None]
        together = 1 if decides(policy) else self._together
        for place in range(0, len(missing), together):
            if place % (10 * together) == 0:
                self._say(f"{name_of(policy)}: video {place + 1} of {len(missing)}")
            self._judge(policy, missing[place : place + together])
        found = (self._find(policy, case) for case in cases)
        return [measurement.values for measurement in found if measurement is not None]

    def _find(self, policy: Policy, case: Case) -> Measurement | None:
        return self._log.find("judged", _BY, name_of(policy), case)

    def _judge(self, policy: Policy, cases: Sequence[Case]) -> None:
        videos = self._videos(policy, cases)
        right = hits(trained_judge(), videos, [case.prompt for case in cases])
        for case, each in zip(cases, right, strict=True):
            values = {f"judge_{n}": float(v) for n, v in zip(ATTRIBUTES, each, strict=True)}
            self._log.keep(
                Measurement("judged", _BY, name_of(policy), case.prompt, case.seed, values)
            )

    def _videos(self, policy: Policy, cases: Sequence[Case]) -> list[np.ndarray]:
        source = self._source
        applied: Any = nullcontext()
        if policy != Policy():
            applied = accelerate(source.pipe, policy, small=source.small)
        with applied:
            output = source.pipe(
                prompt=[case.prompt for case in cases],
                generator=[torch.Generator().manual_seed(case.seed) for case in cases],
                **{**source.call, "output_type": "np"},
            )
        return list(output.frames)


def name_of(policy: Policy) -> str:
    """Return what stands for a policy in the log."""
    return policy.id[7:19]


def decides(policy: Policy) -> bool:
    """Whether a policy decides while it runs: videos made together would decide together."""
    return isinstance(policy.handoff, AdaptiveHandoff) or isinstance(policy.cache, RuleCache)
