"""Write a policy for another tool, where that tool can do the same; refuse it with the reason else.

Only what comes out the same is written. A tool that takes similar numbers for another rule is not
the same: thresholds of one rule say nothing about another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType

from ditune.db.errors import UsageFault
from ditune.db.policy import MaskCache, Policy, RuleCache

_UNLIMITED = -1


def cache_dit(policy: Policy) -> str:
    """Return the YAML that cache-dit's `load_configs` reads.

    It can leave out the blocks between some at the front and some at the back, at listed steps or
    while the front blocks' residual changes little.

    Raises:
        UsageFault: cache-dit cannot do what the policy does.
    """
    cache = policy.cache
    if policy.handoff is not None:
        raise _refused("cache-dit", "it hands over to a small model")
    if cache is None:
        raise _refused("cache-dit", "there is nothing in it to express")
    if cache.fn_blocks < 1:
        raise _refused("cache-dit", "cache-dit always runs the first block")
    lines: dict[str, object] = {
        "Fn_compute_blocks": cache.fn_blocks,
        "Bn_compute_blocks": cache.bn_blocks,
    }
    lines |= _static(cache) if isinstance(cache, MaskCache) else _dynamic(cache)
    if cache.payload.order:
        raise _refused("cache-dit", "its forecasts continue hidden states, not what blocks add")
    # a JSON value is a YAML value
    written = [f"  {name}: {json.dumps(value)}" for name, value in lines.items()]
    return "\n".join(["cache_config:", *written]) + "\n"


def _static(mask: MaskCache) -> dict[str, object]:
    others = set(mask.actions) - {"full", "block"}
    if others:
        raise _refused(
            "cache-dit", f"it reuses {' and '.join(sorted(others))}, and cache-dit only blocks"
        )
    computed = [int(action == "full") for action in mask.actions]
    return {
        "num_inference_steps": len(computed),
        "max_warmup_steps": 0,
        "steps_computation_mask": computed,
        "steps_computation_policy": "static",
    }


def _dynamic(rule: RuleCache) -> dict[str, object]:
    if rule.indicator != "first_block":
        raise _refused("cache-dit", "only the front blocks decide there, not other indicators")
    if rule.granularities != ("block",):
        raise _refused("cache-dit", "it chooses among granularities, and cache-dit has only blocks")
    if rule.warmup_frac > 0 or rule.cooldown_steps:
        raise _refused("cache-dit", "its protected steps are a share of the steps or at their end")
    if rule.accumulated:
        raise _refused("cache-dit", "changes that are added up never start from zero again there")
    return {
        "residual_diff_threshold": rule.threshold,
        "max_warmup_steps": 2,
        "max_continuous_cached_steps": rule.interval_max - 1,
        "cfg_diff_compute_separate": False,  # the conditional branch decides for both
    }


def diffusers(policy: Policy) -> str:
    """Return the Python lines that switch the same on with diffusers' own caches.

    TaylorSeer in its lite mode reuses whole outputs at evenly spaced steps.

    Raises:
        UsageFault: None of diffusers' caches can do what the policy does.
    """
    cache = policy.cache
    if policy.handoff is not None:
        raise _refused("diffusers", "it hands over to a small model")
    if not isinstance(cache, MaskCache):
        raise _refused("diffusers", "none of its caches has this rule")
    if set(cache.actions) != {"full", "step"} or cache.payload.form != "output":
        raise _refused("diffusers", "only TaylorSeer follows a list, and it reuses whole outputs")
    if cache.payload.order and cache.payload.arc_length is not None:
        raise _refused("diffusers", "TaylorSeer forecasts over step numbers, this over arc length")
    first, interval = _spacing(cache)
    arguments = {
        "cache_interval": interval,
        "disable_cache_before_step": first,
        "max_order": cache.payload.order,
        "use_lite_mode": True,
        "taylor_factors_dtype": "pipe.transformer.dtype",
    }
    written = ", ".join(f"{name}={value}" for name, value in arguments.items())
    return (
        "from diffusers import TaylorSeerCacheConfig\n\n"
        f"pipe.transformer.enable_cache(TaylorSeerCacheConfig({written}))\n"
    )


def _spacing(mask: MaskCache) -> tuple[int, int]:
    """Return TaylorSeer's two numbers for a mask.

    It computes the first steps, leaves one out, and then computes every so-many-th.

    Raises:
        UsageFault: The mask is not spaced like that.
    """
    steps = len(mask.actions)
    computed = [i for i, action in enumerate(mask.actions) if action == "full"]
    first = mask.actions.index("step")
    for interval in range(1, steps + 1):
        after = range(first + 1, steps, interval)
        if computed == [*range(first), *after]:
            return first, interval
    raise _refused("diffusers", "its computed steps are not evenly spaced, as TaylorSeer's are")


def _refused(tool: str, reason: str) -> UsageFault:
    return UsageFault(f"this policy cannot be written for {tool}: {reason}; use ditune.accelerate")


WRITERS: Mapping[str, Callable[[Policy], str]] = MappingProxyType(
    {"cache-dit": cache_dit, "diffusers": diffusers}
)
