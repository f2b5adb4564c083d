"""Measure ditune beside its peers: the same prompts, budget, floors and rule of proof for each.

Every setting of every peer is swept on a calibration prompt. For each set of floors, the setting of
least work is tried on the other calibration prompts and then put to the proof on further ones, as
ditune's own candidates are; the next one follows where it fails. What was proved is measured on
held-out prompts: all peers and the plain pipeline in turn on each, in an order that is drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ditune.db.comparison import Comparison, Contender, Lead, Standing
from ditune.db.errors import DituneError, UsageFault
from ditune.db.record import now
from ditune.db.records import Constraint, Interval, Quality, Trial
from ditune.profiler.record import Recorded
from ditune.profiler.statistics import paired_speedup
from ditune.tuner.bench_runs import PLAIN, PLAIN_SETTING, Runs, foreign
from ditune.tuner.confirm import missed
from ditune.tuner.evaluate import Case, Evaluator, cases_of
from ditune.tuner.measurements import Measurement, Measurements
from ditune.tuner.peers import ours
from ditune.tuner.peers.catalogue import PEERS
from ditune.tuner.peers.contract import Setting
from ditune.tuner.quality import metrics, summarise, values_of
from ditune.tuner.search import Budget
from ditune.tuner.sequential import guessed
from ditune.tuner.source import Source
from ditune.tuner.verdict import hopeless, violations

Floors = tuple[Constraint, ...]
_CALIBRATION_SEED, _CONFIRMATION_SEED, _HELD_OUT_SEED = 1_000, 500_000, 700_000
_CANDIDATES = 10  # of a peer at some floors that are put to the proof
_FAR = 0.1  # share of a floor that the first prompt may lie below it
_NO_OP = 1.001  # work ratio of a peer that computed everything
_ONE = Interval(median=1.0, ci95=(1.0, 1.0), n=1)


@dataclass(frozen=True)
class Options:
    """How much to measure."""

    trials: int = 16  # of our search, for each set of floors
    calibration: int = 3
    confirmation: int = 8
    confirmation_seeds: int = 3  # for each prompt of the proof
    held_out: int = 20
    seeds: int = 2  # for each held-out prompt


@dataclass
class _Peer:
    """What the sweep of one peer gave."""

    name: str
    swept: list[tuple[Setting, Measurement]] = field(default_factory=list)
    trouble: str = ""


@dataclass(frozen=True)
class _Chosen:
    """What stands for a peer at some floors; without a setting there is a reason."""

    setting: Setting | None
    reason: str = ""
    flops: int | None = None  # of one generation, None where it depends on the prompt


class Bench:
    """One comparison; what it measured stays in its folder, and another run goes on from there."""

    def __init__(
        self,
        source: Source,
        floors: Sequence[Floors],
        folder: Path,
        options: Options | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare; nothing runs yet.

        Args:
            source: The pipeline and its prompts.
            floors: One or more sets of floors.
            folder: Where measurements are kept; it must exist.
            options: How much to measure.
            progress: Told in a few words what is going on.

        Raises:
            CorruptData: The folder holds measurements that cannot be read.
        """
        self.source = source
        self.floors = list(floors)
        self.folder = folder
        self.options = options or Options()
        self.progress = progress
        self._log = Measurements(folder / "measurements.jsonl")
        held, count = source.held_out, self.options
        self._calibration = cases_of(source.calibration, count.calibration, _CALIBRATION_SEED)
        proof = count.confirmation * count.confirmation_seeds
        self._confirmation = cases_of(held[: count.confirmation], proof, _CONFIRMATION_SEED)
        self._held_out = held_out_cases(source, count)

    def run(self, names: Sequence[str] = tuple(PEERS)) -> Comparison:
        """Sweep, prove and measure; return what came out.

        Raises:
            UsageFault: A peer's name is unknown.
        """
        require_known(names)
        self._runs = Runs(Evaluator(self.source, self._scored()), self._log)
        peers = [self._sweep(name) for name in names]
        recorded = ours.profiled(self.source)
        chosen: list[dict[str, _Chosen]] = []
        for floors in self.floors:
            found = {peer.name: self._choose(peer, floors) for peer in peers}
            found[ours.NAME] = self._choose_ours(recorded, floors)
            chosen.append(found)
        self._measure(chosen)
        profile, options = recorded.profile, self.options
        return Comparison(
            hardware=profile.hardware,
            software=profile.software,
            workload=profile.workload,
            threads=torch.get_num_threads(),
            calibration=options.calibration,
            confirmation=len(self._confirmation),
            held_out=len(self._held_out),
            contenders=tuple(c for peer in peers for c in self._contenders(peer)),
            standings=tuple(
                self._standing(name, floors, choice)
                for floors, found in zip(self.floors, chosen, strict=True)
                for name, choice in found.items()
            ),
            leads=tuple(
                self._lead(floors, found) for floors, found in zip(self.floors, chosen, strict=True)
            ),
            created_at=now(),
        )

    def _scored(self) -> Floors:
        """Return the floors, and something to score by for every other metric that can be used."""
        bounded = {c.metric: c for each in self.floors for c in each}
        first = self._calibration[0]
        video = Evaluator(self.source, tuple(bounded.values())).plain(first)
        found = list(bounded.values())
        for name in metrics():
            unbounded = Constraint(metric=name, statistic="mean", floor=0.0)
            try:
                values_of([unbounded], video, video, first.prompt)
            except UsageFault:  # a judge of other prompts
                continue
            if name not in bounded:
                found.append(unbounded)
        return tuple(found)

    # --- sweep ---------------------------------------------------------------------------------

    def _sweep(self, name: str) -> _Peer:
        """Run every setting of a peer on the first calibration prompt."""
        peer = _Peer(name)
        try:
            with foreign(name):
                settings = PEERS[name](self.source)
            for index, setting in enumerate(settings):
                self.progress(f"{name}: {setting.label} ({index + 1} of {len(settings)})")
                found = self._runs.counted(name, setting, self._calibration[0])
                peer.swept.append((setting, found))
        except DituneError as fault:
            peer.trouble = str(fault)
        ratios = [self._work_ratio(found) for _, found in peer.swept]
        if ratios and max(ratios) < _NO_OP and not peer.trouble:
            peer.trouble = f"{name} does nothing here: every setting computed everything"
        return peer

    def _work_ratio(self, found: Measurement) -> float:
        assert found.flops is not None
        return self._plain_flops() / found.flops

    def _plain_flops(self) -> int:
        """Return the operations of the plain pipeline, the same for every prompt."""
        counted = self._runs.counted(PLAIN, PLAIN_SETTING, self._calibration[0])
        assert counted.flops is not None
        return counted.flops

    def _contenders(self, peer: _Peer) -> list[Contender]:
        return [
            Contender(
                peer=peer.name,
                setting=setting.label,
                work_ratio=self._work_ratio(found),
                quality=_quality([found]),
                n=1,
            )
            for setting, found in peer.swept
        ]

    # --- proof ---------------------------------------------------------------------------------

    def _choose(self, peer: _Peer, floors: Floors) -> _Chosen:
        """Return the peer's setting of least work that is proved to hold some floors."""
        if peer.trouble:
            return _Chosen(None, peer.trouble)
        by_work = sorted(peer.swept, key=lambda each: -self._work_ratio(each[1]))
        return self._proved(peer.name, [setting for setting, _ in by_work], floors)

    def _choose_ours(self, recorded: Recorded, floors: Floors) -> _Chosen:
        """Search under some floors and put what is found to the same proof."""

        def show(trial: Trial, count: int) -> None:
            self.progress(f"{ours.NAME}: trial {count} of {self.options.trials}")

        budget = Budget(self.options.trials)
        evaluator = Evaluator(self.source, floors)
        found = ours.fastest(evaluator, recorded, self._calibration, self.folder, budget, show)
        return self._proved(ours.NAME, found, floors)

    def _proved(self, name: str, settings: Sequence[Setting], floors: Floors) -> _Chosen:
        """Return the first of some settings that holds the floors on all confirmation prompts."""
        reason = "no setting holds the floors on the calibration prompts"
        tried = 0
        for setting in settings:
            flops = self._calibrated(name, setting, floors)
            if not flops:
                continue
            self.progress(f"{name}: proving {setting.label}")
            reason = self._missed(name, setting, floors)
            tried += 1
            if not reason:
                return _Chosen(setting, flops=flops.pop() if len(flops) == 1 else None)
            if tried == _CANDIDATES:
                break
        return _Chosen(None, reason)

    def _calibrated(self, name: str, setting: Setting, floors: Floors) -> set[int]:
        """Return the operations of a setting on the calibration prompts, none if it misses."""
        found: list[Measurement] = []
        expected = guessed(floors, len(self._calibration))
        for case in self._calibration:
            found.append(self._runs.counted(name, setting, case))
            first = found[0].values
            far_off = any(first[c.metric] < c.floor - _FAR * abs(c.floor) for c in floors)
            if far_off or hopeless(floors, [m.values for m in found], expected):
                return set()
        held = max(violations(floors, [m.values for m in found]).values()) <= 0
        return {m.flops or 0 for m in found} if held else set()

    def _missed(self, name: str, setting: Setting, floors: Floors) -> str:
        """Return which floor a setting misses in the proof, empty if none."""
        values = []
        for case in self._confirmation:
            values.append(self._runs.timed(name, setting, case).values)
            reason = missed(floors, values, len(self._confirmation) - len(values))
            if reason:
                return reason
        return ""

    # --- held-out ------------------------------------------------------------------------------

    def _measure(self, chosen: Sequence[dict[str, _Chosen]]) -> None:
        """Time whatever was chosen, once for each case even if it stands at several floors."""
        settings = {
            (name, choice.setting.label): choice.setting
            for found in chosen
            for name, choice in found.items()
            if choice.setting is not None
        }
        in_turn = [(name, setting) for (name, _), setting in settings.items()]
        self._runs.timed_in_turn(in_turn, self._held_out, self.progress)

    def _flops(self, name: str, choice: _Chosen) -> list[int]:
        """Return the operations on each held-out prompt, with the first of its seeds."""
        cases = self._held_out[: self.options.held_out]
        if choice.setting is None:
            return [self._plain_flops()] * len(cases)
        if choice.flops is not None:
            return [choice.flops] * len(cases)
        self.progress(f"{name}: counting {choice.setting.label}")
        counted = [self._runs.counted(name, choice.setting, case) for case in cases]
        return [m.flops or 0 for m in counted]

    def _timed(self, name: str, choice: _Chosen) -> list[Measurement]:
        if choice.setting is None:
            name, choice = PLAIN, _Chosen(PLAIN_SETTING)
        assert choice.setting is not None
        return [self._runs.timed(name, choice.setting, case) for case in self._held_out]

    def _standing(self, name: str, floors: Floors, choice: _Chosen) -> Standing:
        """Return where a peer stands at some floors."""
        if choice.setting is None:
            return Standing(
                peer=name,
                floors=floors,
                setting=None,
                reason=choice.reason,
                work_ratio=_ONE,
                speedup=_ONE,
                quality={},
                holds=False,
            )
        found = self._timed(name, choice)
        asked = summarise(floors, [m.values for m in found])
        plain = self._timed(PLAIN, _Chosen(PLAIN_SETTING))
        flops = self._flops(name, choice)
        return Standing(
            peer=name,
            floors=floors,
            setting=choice.setting.label,
            policy=choice.setting.policy,
            reason="",
            work_ratio=paired_speedup([self._plain_flops()] * len(flops), flops),
            speedup=paired_speedup([m.ms or 0 for m in plain], [m.ms or 0 for m in found]),
            quality=_quality(found),
            holds=all(
                (asked[c.name].mean if c.statistic == "mean" else asked[c.name].worst) >= c.floor
                for c in floors
            ),
        )

    def _lead(self, floors: Floors, found: dict[str, _Chosen]) -> Lead:
        """Compare ours with the best peer, prompt by prompt: once by work, once by latency."""
        mine = found[ours.NAME]
        flops = {name: self._flops(name, choice) for name, choice in found.items()}
        lasted = {n: [m.ms or 0 for m in self._timed(n, choice)] for n, choice in found.items()}
        work = {n: paired_speedup(f, self._flops(ours.NAME, mine)) for n, f in flops.items()}
        speed = {n: paired_speedup(ms, lasted[ours.NAME]) for n, ms in lasted.items()}
        rivals = [name for name in found if name != ours.NAME]
        by_work = min(rivals, key=lambda name: work[name].median)
        by_speed = min(rivals, key=lambda name: speed[name].median)
        return Lead(
            floors=floors,
            best_by_work=by_work,
            work=work[by_work],
            best_by_speed=by_speed,
            speed=speed[by_speed],
        )


def held_out_cases(source: Source, options: Options) -> list[Case]:
    """Return the cases that figures rest on: every prompt once, then again with the next seeds."""
    rest = source.held_out[options.confirmation :][: options.held_out] or source.held_out
    return cases_of(rest, options.held_out * options.seeds, _HELD_OUT_SEED)


def require_known(names: Sequence[str]) -> None:
    """Check the names of peers before anything is loaded.

    Raises:
        UsageFault: One is unknown.
    """
    if unknown := [name for name in names if name not in PEERS]:
        raise UsageFault(f"unknown peers {unknown}: known are {', '.join(PEERS)}")


def _quality(found: Sequence[Measurement]) -> dict[str, Quality]:
    """Return mean and worst over some generations of each metric that all of them have."""
    quality = {}
    for name in sorted(set.intersection(*(set(m.values) for m in found))):
        scores = [m.values[name] for m in found]
        mean = sum(scores) / len(scores)
        quality[name] = Quality(floor=None, mean=mean, worst=min(scores), n=len(scores))
    return quality
