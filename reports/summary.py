"""What a page says in sentences: the result first, then the conditions under which it holds."""

from __future__ import annotations

from dataclasses import dataclass

from ditune.db.policy import Policy
from ditune.db.record import Record, Status
from ditune.db.records import Evidence, Profile, Trial, Workload
from ditune.reports import gather
from ditune.reports.charts import ending
from ditune.reports.content import ReportContent
from ditune.reports.words import (
    duration,
    factor,
    interval,
    metric_label,
    moment,
    number,
    search_in_words,
)

STATUS_WORDS: dict[Status, str] = {
    "measured": "run and timed on this hardware",
    "predicted": "calculated, not run",
    "compiled": "built for this hardware, not run on it",
    "simulated": "run on something that imitates this hardware",
}
_GIB = 2**30
_AGREES = 0.1  # a measured speedup so near to the expected one needs no explanation
_UNITS = {"memory_bytes": "memory", "power_limit_w": "power limit"}


@dataclass(frozen=True)
class Group:
    """Conditions of one kind, as names and values."""

    title: str
    rows: tuple[tuple[str, str], ...]


def headline(content: ReportContent) -> str:
    """Return the page's heading: the pipeline, and how much faster it became."""
    pipeline = content.study.settings.workload.pipeline_class
    if content.chosen is None:
        return f"{pipeline}: no policy held the floors"
    return f"{pipeline}, {factor(content.chosen.evidence.speedup.median)} as fast"


def summary(content: ReportContent) -> str:
    """Return the paragraph that a reader in a hurry reads: what, where, how fast, how good."""
    settings = content.study.settings
    tuned = (
        f"{settings.workload.pipeline_class} was tuned on {settings.hardware.device_name} "
        f"({output_of(settings.workload)})."
    )
    if content.chosen is None:
        return f"{tuned} {_nothing_held(content)}"
    evidence = content.chosen.evidence
    speedup = evidence.speedup
    return (
        f"{tuned} With the policy below one call takes {duration(evidence.tuned_ms)} instead of "
        f"{duration(evidence.baseline_ms)}: {factor(speedup.median)} as fast, 95 % interval "
        f"{interval(speedup)} over {speedup.n} interleaved pairs. "
        f"{_against_floors(content, evidence)} "
        f"Status: {evidence.status}, that is {STATUS_WORDS[evidence.status]}."
    )


def output_of(workload: Workload) -> str:
    """Say what one call generates: its size, frames and steps."""
    frames = f"{workload.frames} frames, " if workload.frames > 1 else ""
    return f"{workload.width} \u00d7 {workload.height} px, {frames}{workload.steps} steps"


def best_seen_in_words(content: ReportContent) -> str:
    """Say which trial came nearest, where no policy was chosen."""
    best = gather.best_seen(content)
    if best is None or best.speedup is None:
        return "No trial ran to its end, so there is no best one to show."
    said = f"Trial {best.number} came nearest: {factor(best.speedup)} as fast in the search. "
    return said + _why_not(content, best)


def profile_in_words(profile: Profile) -> str:
    """Say what one call of the plain pipeline costs, and on how much that rests."""
    prompts = "1 prompt" if profile.prompts == 1 else f"{profile.prompts} prompts"
    return (
        f"One call takes {duration(profile.total_ms)} in the median over {prompts}. "
        f"Status of this section: {profile.status}."
    )


def steps_in_words(policy: Policy, content: ReportContent) -> str:
    """Say as text what the strip of a policy shows: stretches of steps and their action."""
    cells = gather.strip(policy, content.profile)
    return "; ".join(
        f"{first} to {last} {cell.action}" if last > first else f"{first} {cell.action}"
        for first, last, cell in gather.runs(cells)
    )


def conditions(content: ReportContent) -> tuple[Group, ...]:
    """Return everything that the numbers depend on, in groups."""
    settings = content.study.settings
    return (
        Group("Hardware", _rows(settings.hardware)),
        Group("Software", _rows(settings.software)),
        Group("Workload", _rows(settings.workload)),
        Group("Search and proof", tuple(_search(content))),
    )


def _against_floors(content: ReportContent, evidence: Evidence) -> str:
    rows = gather.quality_rows(content.study.settings, evidence.quality, evidence.bound_by)
    asked = [(row, row.floor) for row in rows if row.floor is not None]
    said = ", ".join(
        f"{row.label} {number(_bounded(row))}{' ' + row.unit if row.unit else ''} "
        f"(floor {number(floor)})"
        for row, floor in asked
    )
    if not said:
        return "No quality floor was asked for."
    broken = [row.label for row, _ in asked if not row.held]
    if broken:
        return f"On prompts that the search never saw: {said}. Not held: {', '.join(broken)}."
    return f"On prompts that the search never saw every floor held: {said}."


def _bounded(row: gather.QualityRow) -> float:
    return row.quality.mean if row.statistic == "mean" else row.quality.worst


def _nothing_held(content: ReportContent) -> str:
    floors = ", ".join(
        f"{metric_label(c)} at least {number(c.floor)}" for c in content.study.settings.constraints
    )
    return (
        f"Of {len(content.trials)} trials no policy held the floors ({floors}) and was certainly "
        "faster on prompts that the search never saw, so the plain pipeline stays as it is. That "
        "is a result, not a failure."
    )


def _why_not(content: ReportContent, trial: Trial) -> str:
    if trial.feasible:
        return "It held the floors there, but not on prompts that the search never saw."
    missed = [
        f"{metric_label(c)} {number(gather.bounded_value(c, trial.quality[c.name]))} "
        f"(floor {number(c.floor)})"
        for c in content.study.settings.constraints
        if trial.violation.get(c.name, 0.0) > 0 and c.name in trial.quality
    ]
    if not missed:
        return f"Result: {ending(trial)}."
    # a value above its floor can miss it: the search asks for one standard error more
    said = ", ".join(missed)
    return f"With the margin of one standard error that a search keeps, it missed: {said}."


def _rows(record: Record) -> tuple[tuple[str, str], ...]:
    values = record.model_dump()
    rows = [
        (_UNITS.get(name, name.replace("_", " ")), _value(name, v)) for name, v in values.items()
    ]
    return tuple((name, value) for name, value in rows if value)


def _value(name: str, value: object) -> str:
    """Return a field's value as text, empty if there is none."""
    if value is None:
        return ""
    if name == "memory_bytes" and isinstance(value, int):
        return f"{value / _GIB:.1f} GiB"
    if name == "power_limit_w":
        return f"{value} W"
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _search(content: ReportContent) -> list[tuple[str, str]]:
    study, profile = content.study, content.profile
    rows = [
        ("study", study.name),
        ("started", moment(study.created_at)),
        ("seed", str(study.settings.seed)),
        ("floors", ", ".join(f"{c.name} >= {c.floor:g}" for c in study.settings.constraints)),
        ("prompts searched", study.settings.prompts_digest),
        ("prompts profiled", str(profile.prompts)),
        ("plain call, profiled", f"{duration(profile.total_ms)} ({profile.status})"),
    ]
    if profile.peak_bytes is not None:
        rows.append(("peak memory", f"{profile.peak_bytes / _GIB:.2f} GiB"))
    if (clocks := profile.clocks) is not None:
        spread = f"{clocks.sm_mhz_min} / {clocks.sm_mhz_median} / {clocks.sm_mhz_max} MHz"
        rows.append(("clock, min / median / max", spread))
        rows.append(("throttled by", ", ".join(clocks.throttle_reasons) or "nothing"))
    if content.chosen is not None:
        evidence = content.chosen.evidence
        rows += [
            ("policy", content.chosen.policy_id),
            ("prompts confirmed", evidence.prompts_digest),
            ("candidates confirmed", str(evidence.candidates)),
            ("confirmed", moment(evidence.created_at)),
            ("commit", evidence.git_commit or "not known"),
        ]
    return rows


def searched_in_words(evidence: Evidence | None) -> str:
    """Say what the search saw of a policy, apart from its proof; empty where that is not kept."""
    if evidence is None or evidence.search is None:
        return ""
    return f"No part of this proof: {search_in_words(evidence.search)}"


def agreement_in_words(content: ReportContent) -> str:
    """Say whether the measured speedup is what the work that was left out lets expect."""
    expected, chosen = content.expected, content.chosen
    if expected is None or chosen is None:
        return ""
    measured = chosen.evidence.speedup.median
    parts = ", ".join(f"{name} {duration(ms)}" for name, ms in expected.parts_ms.items())
    gap = measured / expected.speedup - 1.0
    verdict = f"measured was {factor(measured)}"
    if abs(gap) > _AGREES:
        cause = "noise of the machine" if gap > 0 else "gaps on the host, or a busier machine"
        verdict += f", {abs(gap):.0%} {'more' if gap > 0 else 'less'}: {cause}"
    share = f"{1.0 / expected.work_ratio:.0%}"
    return (
        f"The policy runs {share} of the transformer's blocks. A plain call spends its time so: "
        f"{parts}. As only the transformer's part shrinks, {factor(expected.speedup)} is to be "
        f"expected; {verdict}."
    )
