"""A policy of one space as it fits another: other steps, other guidance, another model.

Computed steps go where they were as a share of all steps. A schedule with the same shift has the
same noise levels there, whatever the number of its steps, so that gaps stay as long as they were on
the way from noise to video; and nothing has to be known of the profile that they were made from.
Noise levels of hand-offs stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from ditune.db.policy import (
    Action,
    AdaptiveHandoff,
    CachePolicy,
    Granularity,
    Handoff,
    HandoffPolicy,
    MaskCache,
    Payload,
    Policy,
    RuleCache,
)
from ditune.tuner.handoffs import small_steps
from ditune.tuner.space import Space


def carried(policy: Policy, space: Space) -> Policy | None:
    """Return a policy as it fits a space, None where what matters of it does not.

    Args:
        policy: Of another space.
        space: Where it is to be tried.
    """
    cache, handoff = policy.cache, policy.handoff
    if handoff is not None and not _hands_over(handoff, space):
        return None
    if isinstance(cache, MaskCache):
        cache = _mask(cache, handoff, space)
    elif isinstance(cache, RuleCache):
        cache = _rule(cache, space)
        if cache is None:
            return None
    found = Policy(cache=cache, handoff=handoff)
    return found if found != Policy() else None


def _hands_over(handoff: HandoffPolicy, space: Space) -> bool:
    """Whether both models get steps, and the large one begins where it has to."""
    if not space.hands_over:
        return False
    if isinstance(handoff, AdaptiveHandoff):
        return True
    small = small_steps(handoff, space.sigmas)
    begins = not isinstance(handoff, Handoff) or 0 not in small
    return begins and 0 < len(small) < space.steps


def _mask(cache: MaskCache, handoff: HandoffPolicy | None, space: Space) -> MaskCache | None:
    """Return a mask of the space's steps, None if it reuses nothing.

    What the model has no part for is computed, as it would be at run time.
    """
    missing = _missing(cache, space)
    fitting: list[Action] = ["full" if a in missing else a for a in cache.actions]
    if set(fitting) == {"full"}:
        return None
    actions = moved(fitting, space.steps)
    small = set(small_steps(handoff, space.sigmas))
    for step in range(1, space.steps):
        if (step in small) != (step - 1 in small):  # the other model comes in: it reuses nothing
            actions[step] = "full"
    if set(actions) == {"full"}:
        return None
    blocks = (cache.fn_blocks, cache.bn_blocks) if "block" in actions else (1, 0)
    return MaskCache(
        actions=tuple(actions),
        payload=_payload(cache.payload, space, guided="cfg" in actions),
        fn_blocks=blocks[0],
        bn_blocks=blocks[1],
    )


def _rule(rule: RuleCache, space: Space) -> RuleCache | None:
    """Return a rule with this profile's impacts, None if nothing is left that it may reuse."""
    missing = _missing(rule, space)
    allowed = tuple(each for each in rule.allowed if each not in missing)
    if not allowed or (rule.indicator == "first_block" and "block" not in allowed):
        return None
    changes = {
        **space.impacts,
        "allowed": allowed,
        "payload": _payload(rule.payload, space, guided="cfg" in allowed),
    }
    return RuleCache(**{**dict(rule), **changes})


def _missing(cache: CachePolicy, space: Space) -> set[Granularity]:
    """Return the granularities that the space's model has not."""
    missing: set[Granularity] = set() if space.guidance else {"cfg"}
    if cache.fn_blocks + cache.bn_blocks >= space.depth:
        missing.add("block")
    return missing


def _payload(payload: Payload, space: Space, *, guided: bool) -> Payload:
    """Return a payload that forecasts over the space's own arc length."""
    over_arc = payload.order > 0 and payload.arc_length is not None
    return Payload(
        form=payload.form,
        order=payload.order,
        cfg_form=payload.cfg_form if guided else "delta",
        arc_length=space.arc_length if over_arc else None,
    )


def moved(actions: Sequence[Action], steps: int) -> list[Action]:
    """Return the actions of a mask with another number of steps.

    A computed step goes to the nearest step at its share of the way; where there are fewer steps,
    some fall together. Between them each step is reused as the one nearest to it was.

    Args:
        actions: Of the mask; the first one is full.
        steps: Of the new mask.
    """
    there = len(actions)
    nearest = [actions[min(round(step * there / steps), there - 1)] for step in range(steps)]
    found: list[Action] = ["step" if action == "full" else action for action in nearest]
    for step, action in enumerate(actions):
        if action == "full":
            found[min(round(step * steps / there), steps - 1)] = "full"
    return found
