"""Policies, numbers and foreign text said so that a person can read them.

The page and the command line use the same words.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter

from ditune.db.cost import Cost
from ditune.db.policy import (
    Action,
    BandedHandoff,
    Handoff,
    HandoffPolicy,
    MaskCache,
    Payload,
    Policy,
    RuleCache,
)
from ditune.db.records import Constraint, Interval, Quality, SearchFigures

ACTIONS: tuple[Action, ...] = ("full", "step", "cfg", "block")
ACTION_WORDS: dict[Action, str] = {
    "full": "runs in full",
    "step": "reuses the whole step",
    "cfg": "reuses guidance",
    "block": "reuses the middle blocks",
}
_PLURAL: dict[Action, str] = {
    "full": "run in full",
    "step": "reuse the whole step",
    "cfg": "reuse guidance",
    "block": "reuse the middle blocks",
}
_GRANULARITY = {"step": "the whole step", "cfg": "guidance", "block": "the middle blocks"}
_SIGNAL = {"denoised": "denoised estimate", "latent": "latent", "output": "output"}
_FORM = {  # one of them, several of them
    "output": ("output", "outputs"),
    "latent": ("difference from the input", "differences from the input"),
    "hidden": ("hidden state", "hidden states"),
}
_INDICATOR = {
    "latent": "the latents have",
    "spectral": "the latents without their noise have",
    "timestep": "the timestep's embedding has",
    "first_block": "what the first blocks add has",
}
_METRICS = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "vmaf": "VMAF",
    "lpips": "LPIPS",
    "judge": "judge score change",
}
_UNITS = {"psnr": "dB"}
# These reorder the text around them, so a name could be made to read as another one.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_SECOND_MS = 1000.0
_THREE_DIGITS = 999.5  # from here on three significant digits would be written as 1e+03
_FOUR_DIGITS = 9999.5
_LONG_MS = 10_000.0


def policy_in_words(policy: Policy, steps: int | None = None) -> str:
    """Say in full sentences what a policy does.

    Args:
        policy: Any policy, also the empty one.
        steps: Denoising steps of the workload; makes fractions of a rule into step counts.
    """
    said: list[str] = []
    if isinstance(policy.cache, MaskCache):
        said += [_mask(policy.cache), _payload(policy.cache.payload)]
        if "block" in policy.cache.actions:
            said.append(_span(policy.cache))
    elif isinstance(policy.cache, RuleCache):
        said += [*_rule(policy.cache, steps), _payload(policy.cache.payload)]
        if "block" in policy.cache.allowed:
            said.append(_span(policy.cache))
    if policy.handoff is not None:
        said.append(_handoff(policy.handoff))
    return " ".join(said) or "The plain pipeline: nothing is left out."


def policy_in_brief(policy: Policy) -> str:
    """Say in a few words what a policy does, for tables and labels."""
    said: list[str] = []
    if isinstance(policy.cache, MaskCache):
        counts = action_counts(policy.cache)
        said.append("mask: " + ", ".join(f"{n} {action}" for action, n in counts.items() if n))
    elif isinstance(policy.cache, RuleCache):
        rule = policy.cache
        when = f"delta {number(rule.delta2)}, interval {rule.interval_init} to {rule.interval_max}"
        if rule.indicator is not None:
            when = f"{rule.indicator} {number(rule.threshold)}, at most {rule.interval_max}"
        said.append(f"rule: {when}, {', '.join(rule.granularities)}")
    if policy.handoff is not None:
        said.append(_handoff_in_brief(policy.handoff))
    return "; ".join(said) or "plain pipeline"


def action_counts(mask: MaskCache) -> dict[Action, int]:
    """Return how many steps take each action, in the order full, step, cfg, block."""
    counted = Counter(mask.actions)
    return {action: counted[action] for action in ACTIONS}


def counted_action(action: Action, count: int) -> str:
    """Return "1 runs in full" or "24 reuse the whole step"."""
    return f"{count} {ACTION_WORDS[action] if count == 1 else _PLURAL[action]}"


def metric_label(constraint: Constraint) -> str:
    """Return a constraint's metric as people write it: "PSNR", "PSNR of the worst prompt"."""
    name = _METRICS.get(constraint.metric, constraint.metric)
    return name if constraint.statistic == "mean" else f"{name} of the worst prompt"


def unit_of(constraint: Constraint) -> str:
    """Return the unit of a constraint's metric, empty where it has none."""
    return _UNITS.get(constraint.metric, "")


def number(value: float) -> str:
    """Return a number with four significant digits and no needless zeros."""
    return f"{value:,.0f}" if abs(value) >= _FOUR_DIGITS else f"{value:.4g}"


def factor(value: float) -> str:
    """Return a speedup as people write it: "1.87x"."""
    return f"{value:.2f}x"


def interval(found: Interval) -> str:
    """Return the bounds of a speedup's 95 % interval: "1.81x to 1.93x"."""
    return f"{factor(found.ci95[0])} to {factor(found.ci95[1])}"


def search_in_words(found: SearchFigures) -> str:
    """Say what a search saw of a policy, in words that nobody takes for a proof."""
    tried = "1 policy" if found.trials == 1 else f"{found.trials} policies"
    if found.prompts == 0:
        return f"The search tried {tried} and never this one: it was only predicted."
    seen = [f"{name} {number(_bounded(name, quality))}" for name, quality in found.quality.items()]
    if found.speedup is not None:
        pairs = "1 pair" if found.pairs == 1 else f"{found.pairs} pairs"
        seen.insert(0, f"{factor(found.speedup)} ({pairs})")
    prompts = "1 prompt" if found.prompts == 1 else f"{found.prompts} prompts"
    return (
        f"The search, which chose among {tried}, saw {', '.join(seen)} on {prompts} of its own; a "
        "choice leans on luck."
    )


def cost_in_words(cost: Cost) -> str:
    """Say what a session took, part by part."""
    stages = {"profile": cost.profile, "search": cost.search, "proof": cost.proof}
    times = ", ".join(f"{name} {spent.seconds:.0f} s" for name, spent in stages.items())
    videos = ", ".join(f"{name} {spent.videos:.1f}" for name, spent in stages.items())
    return (
        f"{cost.seconds:.0f} s ({times}) and the compute of {cost.videos:.1f} plain videos "
        f"({videos}), {cost.forwards:,} forwards"
    )


def _bounded(name: str, quality: Quality) -> float:
    return quality.worst if name.endswith("_worst") else quality.mean


def memory(byte_count: int) -> str:
    """Return a size in the binary unit that reads best: "512 bytes", "3.2 MiB"."""
    if byte_count < 2**20:
        return f"{byte_count / 2**10:.0f} KiB" if byte_count >= 2**10 else f"{byte_count} bytes"
    unit, name = (2**30, "GiB") if byte_count >= 2**30 else (2**20, "MiB")
    return f"{byte_count / unit:.1f} {name}"


def duration(milliseconds: float) -> str:
    """Return a time in the unit that reads best, three significant digits."""
    if milliseconds >= _LONG_MS:
        return f"{milliseconds / _SECOND_MS:.1f} s"
    if milliseconds >= _THREE_DIGITS:
        return f"{milliseconds:,.0f} ms"
    return f"{milliseconds:.3g} ms"


def moment(timestamp: str) -> str:
    """Return a timestamp of a record without the fractions of its second."""
    return f"{timestamp[:19]}Z"


def visible(text: str) -> str:
    """Return foreign text with everything spelled out that acts instead of being read.

    Terminal escapes, other control characters, lone surrogates (which no file can hold) and
    characters that turn the reading direction become escapes such as \\x1b; the rest stays.
    """
    return "".join(_spelled(char) if _acts(char) else char for char in text)


def shortened(text: str, limit: int) -> str:
    """Return text of at most `limit` characters, the last one an ellipsis if some were cut."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _acts(char: str) -> bool:
    if char in "\n\t":
        return False
    return char in _REORDERING or unicodedata.category(char) in ("Cc", "Cs")


def _spelled(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _mask(mask: MaskCache) -> str:
    counts = action_counts(mask)
    taken = ", ".join(counted_action(action, n) for action, n in counts.items() if n)
    return f"Of {len(mask.actions)} steps {taken}."


def _rule(rule: RuleCache, steps: int | None) -> list[str]:
    reused = " or ".join(_GRANULARITY[granularity] for granularity in rule.granularities)
    pick = ", whichever has changed least" if len(rule.granularities) > 1 else ""
    protected = f"What to reuse is decided while it runs. {_protected(rule, steps)} in full"
    if rule.indicator is not None:
        since = "added up from step to step" if rule.accumulated else "since the last full step"
        return [
            f"{protected}; another one as soon as {_INDICATOR[rule.indicator]} changed by "
            f"{number(rule.threshold)} {since}, or after {rule.interval_max} steps; "
            f"the rest reuse {reused}{pick}.",
        ]
    return [
        f"{protected}; of the others one in {rule.interval_init} at first, and down to one in "
        f"{rule.interval_max} while little changes.",
        f"More are computed when reuse would have changed a full step by more than "
        f"{number(rule.delta2)}, fewer below {number(rule.delta1_ratio * rule.delta2)}; "
        f"the rest reuse {reused}{pick}.",
    ]


def _protected(rule: RuleCache, steps: int | None) -> str:
    first = f"The first {rule.warmup_frac:.0%} of the steps"
    if steps is not None:  # the trigger rounds up, and needs two full steps before it can compare
        warmup = min(steps, max(2, math.ceil(rule.warmup_frac * steps)))
        first = f"The first {warmup} of {steps} steps"
    if rule.cooldown_steps == 0:
        return f"{first} run"
    last = f"the last {rule.cooldown_steps}" if rule.cooldown_steps > 1 else "the last one"
    return f"{first} and {last} run"


def _span(cache: MaskCache | RuleCache) -> str:
    ends = (("first", cache.fn_blocks), ("last", cache.bn_blocks))
    kept = [f"the {end} {f'{n} blocks' if n > 1 else 'block'}" for end, n in ends if n]
    return f"Steps that reuse the middle blocks still run {' and '.join(kept) or 'no block'}."


def _handoff(handoff: HandoffPolicy) -> str:
    if isinstance(handoff, BandedHandoff):
        bands = [f"{number(upper)} and {number(lower)}" for upper, lower in handoff.bands]
        return f"The small model runs between sigma {', between '.join(bands)}."
    if isinstance(handoff, Handoff):
        said = f"The small model takes over below sigma {number(handoff.sigma)}"
    else:
        said = (
            f"The small model takes over once the change of the {_SIGNAL[handoff.signal]} falls by "
            f"less than {number(handoff.delta)} a step, at the earliest after "
            f"{number(100 * handoff.min_frac)} % of the steps, at the latest after "
            f"{number(100 * handoff.max_frac)} %"
        )
    back = "" if handoff.until is None else f", until sigma {number(handoff.until)}"
    return f"{said}{back}."


def _handoff_in_brief(handoff: HandoffPolicy) -> str:
    if isinstance(handoff, BandedHandoff):
        count = len(handoff.bands)
        return f"small model in {count} band{'s' if count > 1 else ''} of sigma"
    if isinstance(handoff, Handoff):
        said = f"hand-off below sigma {number(handoff.sigma)}"
    else:
        said = f"adaptive hand-off, {handoff.signal} {number(handoff.delta)}"
    return said if handoff.until is None else f"{said}, until {number(handoff.until)}"


def _payload(payload: Payload) -> str:
    one, several = _FORM[payload.form]
    if payload.order == 0:
        return f"What is left out repeats the last {one}."
    curve, known = ("line", "two") if payload.order == 1 else ("parabola", "three")
    said = f"What is left out is continued in a {curve} through the last {known} {several}"
    return said + (", over arc length." if payload.arc_length is not None else ".")
