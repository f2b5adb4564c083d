"""Each chart of the page with what a reader needs beside it: one sentence, and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditune.db.policy import MaskCache
from ditune.db.records import LayerTiming, Trial
from ditune.reports import figures, gather
from ditune.reports.content import ReportContent, TierShown
from ditune.reports.words import (
    action_counts,
    counted_action,
    duration,
    factor,
    interval,
    metric_label,
    number,
    policy_in_brief,
)

NONE = "\u2013"  # what a table shows where there is no value
_UNTIMED = " by work"  # of a speedup that other trials let expect
_ENDINGS: dict[gather.Verdict, str] = {
    "feasible": "holds the floors",
    "infeasible": "misses a floor",
    "rejected": "stopped early",
    "baseline": "plain pipeline",
}


@dataclass(frozen=True)
class Table:
    """Cells as text; `words` are the columns that are read, the others are numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Chart:
    """A figure, the sentence that says what it shows, and its numbers as a table."""

    key: str
    title: str
    summary: str
    figure: figures.Figure
    table: Table


def charts(content: ReportContent) -> dict[str, Chart]:
    """Return the charts that have something to show, by key."""
    gathered = gather.layers(content.profile)
    found = [
        _trials(content),
        _redundancy(content),
        _parts(gathered) if gathered.parts else None,
        _blocks(gathered) if gathered.stacks else None,
    ]
    return {chart.key: chart for chart in found if chart is not None}


def trials_table(content: ReportContent) -> Table:
    """Return one row per trial: what it was, what it gave, and why it ended."""
    asked = content.study.settings.constraints
    names = tuple(metric_label(c) for c in asked)

    def row(trial: Trial) -> tuple[str, ...]:
        values = tuple(
            number(gather.bounded_value(c, trial.quality[c.name]))
            if c.name in trial.quality
            else NONE
            for c in asked
        )
        speedup = factor(trial.speedup) if trial.speedup is not None else NONE
        if trial.pairs == 0 and trial.source != "baseline":
            speedup += _UNTIMED
        return (
            str(trial.number),
            trial.source,
            ending(trial),
            speedup,
            *values,
            policy_in_brief(trial.policy),
            trial.reason or NONE,
            f"{trial.duration_s:.1f}",
        )

    head = ("trial", "source", "result", "speedup", *names, "policy", "reason", "seconds")
    words = frozenset({1, 2, len(names) + 4, len(names) + 5})
    return Table(head, tuple(row(t) for t in gather.listed(content.trials)), words)


def ways_table(content: ReportContent) -> Table | None:
    """Return one row for each way to leave work out, None where nothing handed over."""

    def row(way: gather.Way) -> tuple[str, ...]:
        best = way.fastest
        if best is None or best.speedup is None:
            return (way.name, str(way.tried), NONE, NONE, "none held the floors")
        return (
            way.name,
            str(way.tried),
            str(best.number),
            factor(best.speedup),
            policy_in_brief(best.policy),
        )

    found = gather.ways(content.trials)
    head = ("way", "trials", "fastest that held", "speedup", "policy")
    return Table(head, tuple(map(row, found)), frozenset({0, 4})) if found else None


def tiers_table(tiers: Sequence[TierShown]) -> Table | None:
    """Return one row for each tier: its floors, and what was proved; None where there are none."""

    def row(tier: TierShown) -> tuple[str, ...]:
        floors = ", ".join(f"{c.name}>={c.floor:g}" for c in tier.floors)
        if tier.chosen is None:
            return (tier.name, floors, NONE, NONE, NONE, "none held the floors")
        evidence = tier.chosen.evidence
        values = (
            f"{c.name} {number(gather.bounded_value(c, evidence.quality[c.name]))}"
            for c in tier.floors
            if c.name in evidence.quality
        )
        speed = (factor(evidence.speedup.median), interval(evidence.speedup))
        return (tier.name, floors, *speed, ", ".join(values), tier.chosen.policy_id[:19])

    head = ("tier", "floors", "speedup", "95 % interval", "quality", "policy")
    return Table(head, tuple(map(row, tiers)), frozenset({0, 1, 4, 5})) if tiers else None


def ending(trial: Trial) -> str:
    """Say how a trial ended."""
    return "failed" if trial.state == "failed" else _ENDINGS[gather.verdict(trial)]


def _trials(content: ReportContent) -> Chart | None:
    gathered = gather.scatter(content)
    if gathered.constraint is None or not gathered.points:
        return None
    held = [t for t in content.trials if gather.verdict(t) == "feasible"]
    said = f"Of {len(content.trials)} trials {len(held) or 'none'} held every floor"
    if held:
        said += f"; the fastest of them ran {factor(max(t.speedup or 0.0 for t in held))} as fast"
    said += "."
    if len(content.trials) > gather.TRIALS_SHOWN:
        said += f" The best {gather.TRIALS_SHOWN} are drawn."
    if gathered.left_out:
        said += f" {gathered.left_out} gave no figure and cannot be drawn."
    if any(p.verdict == "baseline" for p in gathered.points):
        said += " The plain pipeline equals itself and is drawn at the upper edge."
    if gathered.ringed is not None:
        said += " The ring marks the chosen policy as the search saw it."
    if gathered.confirmed is not None:
        said += " The star is what it gave on prompts that the search never saw."
    floor = gathered.constraint.floor
    if any(p.verdict == "infeasible" and p.quality >= floor for p in gathered.points):
        said += " A cross above the line misses another floor, or this one with its margin."
    metric = metric_label(gathered.constraint)
    rows = tuple(
        (str(p.trial.number), _ENDINGS[p.verdict], factor(p.speedup), number(p.quality))
        for p in gathered.points
    )
    table = Table(("trial", "result", "speedup", metric), rows, frozenset({1}))
    return Chart("trials", "Every policy tried", said, figures.trials(gathered), table)


def _redundancy(content: ReportContent) -> Chart | None:
    gathered = gather.redundancy(content.profile)
    policy = content.chosen.policy if content.chosen is not None else None
    cells = gather.strip(policy, content.profile) if policy is not None else ()
    if not gathered.lines:
        return None
    rows = _redundancy_rows(gathered, cells)
    head = ("step", "sigma", *gathered.lines)
    head += ("small against large",) if gathered.disagreement is not None else ()
    head += ("policy",) if cells else ()
    table = Table(head, rows, frozenset({len(head) - 1}) if cells else frozenset())
    said = _most_and_least(gathered)
    if policy is not None and isinstance(policy.cache, MaskCache):
        counts = action_counts(policy.cache)
        said += f" Below stands the chosen policy: {counted_action('full', counts['full'])}."
    figure = figures.redundancy(gathered, cells)
    return Chart("redundancy", "How much each step repeats the one before", said, figure, table)


def _redundancy_rows(
    gathered: gather.Redundancy, cells: Sequence[gather.StripCell]
) -> tuple[tuple[str, ...], ...]:
    taken = {cell.step: cell.action + (", small model" if cell.small else "") for cell in cells}
    rows = []
    for place, step in enumerate(gathered.steps):
        values = [gathered.sigma[place], *(line[place] for line in gathered.lines.values())]
        if gathered.disagreement is not None:
            values.append(gathered.disagreement[place])
        row = [str(step), *(NONE if value is None else number(value) for value in values)]
        rows.append((*row, taken.get(step, NONE)) if cells else tuple(row))
    return tuple(rows)


def _most_and_least(gathered: gather.Redundancy) -> str:
    name, line = next(iter(gathered.lines.items()))
    known = [
        (value, step) for value, step in zip(line, gathered.steps, strict=True) if value is not None
    ]
    (least, calm), (most, busy) = min(known), max(known)
    what = {"whole step": "The model's output", "guidance": "Guidance"}.get(
        name, "The blocks' work"
    )
    return (
        f"{what} changes least at step {calm} ({least:.1%}) and most at step {busy} ({most:.1%}), "
        "each against the step before."
    )


def _parts(gathered: gather.Layers) -> Chart:
    slowest = max(gathered.parts, key=lambda part: part.median_ms)
    said = (
        f"One call of {slowest.name} takes longest, {duration(slowest.median_ms)} in the median; "
        f"it was called {slowest.n} {'time' if slowest.n == 1 else 'times'}."
    )
    return Chart(
        "parts", "Parts of the pipeline", said, figures.parts(gathered), _timings(gathered.parts)
    )


def _blocks(gathered: gather.Layers) -> Chart:
    found = [block for blocks in gathered.stacks.values() for block in blocks]
    fastest = min(found, key=lambda block: block.median_ms)
    slowest = max(found, key=lambda block: block.median_ms)
    said = (
        f"The {len(found)} transformer blocks take {duration(fastest.median_ms)} to "
        f"{duration(slowest.median_ms)} per call in the median; slowest is {slowest.name}."
    )
    return Chart("blocks", "Transformer blocks", said, figures.blocks(gathered), _timings(found))


def _timings(found: Sequence[LayerTiming]) -> Table:
    rows = tuple(
        (t.name, number(t.median_ms), number(t.p20_ms), number(t.p80_ms), str(t.n)) for t in found
    )
    head = ("layer", "median, ms", "p20, ms", "p80, ms", "calls")
    return Table(head, rows, frozenset({0}))
