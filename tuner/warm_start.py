"""Where a search starts from: what was proved for the nearest model, hardware and steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ditune.db.policy import Policy
from ditune.db.records import Constraint, Evidence, Hardware, PolicyFile, Settings, Study, Workload
from ditune.tuner.carrying import carried
from ditune.tuner.space import Proposal, Space

_MOST = 3  # each costs a trial
_UNKNOWN = 1.0  # how far apart floors are of which one is not known


class PolicyStore(Protocol):
    """Where proved policies are kept: `db.store.Store`."""

    def policies_of(self, transformer_class: str) -> list[PolicyFile]:
        """Return every policy that was proved for a class of models, the last stored first."""


@dataclass(frozen=True)
class WarmStart:
    """What a search tries first, the nearest first, and a sentence on it, empty without any."""

    proposals: tuple[Proposal, ...]
    note: str


def warm_start(
    store: PolicyStore, study: Study, space: Space, related: Collection[str] = ()
) -> WarmStart:
    """Return what was proved elsewhere as it fits a search, at most three policies.

    What the study itself proved is left out, so that going on with it changes nothing.

    Args:
        store: Holds the policies.
        study: Of the search.
        space: Of the search.
        related: Names of other studies whose policies are left out, because their trials are known.
    """
    settings = study.settings
    known = [
        each
        for each in store.policies_of(settings.workload.transformer_class)
        if each.evidence.status == "measured" and each.evidence.study not in (study.name, *related)
    ]
    found: dict[Policy, PolicyFile] = {}
    for each in sorted(known, key=partial(_distance, settings)):
        policy = carried(each.policy, space)
        if policy is not None and len(found) < _MOST:
            found.setdefault(policy, each)
    proposals = tuple(space.warm(policy) for policy in found)
    return WarmStart(proposals, _note(list(found.values())))


def _distance(settings: Settings, there: PolicyFile) -> tuple[float, ...]:
    """Return how far a proved policy is from a search; what comes first decides."""
    here, workload = settings.workload, there.workload
    size = [each.height * each.width * each.frames for each in (here, workload)]
    differing = sum(value != getattr(workload, name) for name, value in here)
    return (
        workload.model_digest != here.model_digest,
        workload.pipeline_class != here.pipeline_class,
        _hardware(settings.hardware, there.hardware),
        abs(math.log(workload.steps / here.steps)),
        abs(math.log(size[1] / size[0])),
        _floors(settings.constraints, there.evidence),
        differing,
    )


def _hardware(here: Hardware, there: Hardware) -> int:
    """Return 0 for the same hardware, 1 for the same kind, 2 for another."""
    return 0 if here.key == there.key else 1 if here.kind == there.kind else 2


def _floors(constraints: Sequence[Constraint], evidence: Evidence) -> float:
    """Return how far a policy's floors are from those of a search, relative to these."""
    apart = 0.0
    for constraint in constraints:
        held = evidence.quality.get(constraint.name)
        floor = None if held is None else held.floor
        scale = max(abs(constraint.floor), 1e-3)
        apart += _UNKNOWN if floor is None else abs(floor - constraint.floor) / scale
    return apart


def _note(found: Sequence[PolicyFile]) -> str:
    if not found:
        return ""
    origins = [
        f"{each.policy_id[7:19]} ({_where(each.workload, each.hardware)}, "
        f"{each.evidence.speedup.median:.2f}x there)"
        for each in found
    ]
    policies = "1 proved policy" if len(found) == 1 else f"{len(found)} proved policies"
    return f"warm start: the search began with {policies} of other searches: {', '.join(origins)}"


def _where(workload: Workload, hardware: Hardware) -> str:
    return f"{workload.steps} steps on {hardware.device_name}"
