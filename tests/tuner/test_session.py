"""A whole session in this process, on a small pipeline with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.tuner.conftest import TINY_STEPS

from ditune.db.cost import Spent
from ditune.db.engine import study_storage_url
from ditune.db.store import Store
from ditune.tuner.meter import Meter
from ditune.tuner.progress import Stage
from ditune.tuner.result import Options, Result
from ditune.tuner.search import Budget, Search
from ditune.tuner.session import Session
from ditune.tuner.source import FolderSource

OPTIONS = Options(
    quality="psnr>=5", trials=4, profile_prompts=1, search_prompts=2, confirm_prompts=4
)
BRANCHES = 2


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(str(tmp_path / "ours.db")) as opened:
        yield opened


def run(tiny: FolderSource, store: Store, options: Options = OPTIONS) -> Result:
    return Session(tiny, store, options).run(study_storage_url(store.where))


def counted(tiny: FolderSource) -> list[str]:
    """Return a list that grows with every block that runs."""
    ran: list[str] = []

    def note(*_: object) -> None:
        ran.append("block")

    for block in tiny.pipe.transformer.blocks:
        block.register_forward_hook(note)
    return ran


def test_a_session_counts_all_that_it_computes(tiny: FolderSource, store: Store) -> None:
    depth = len(tiny.pipe.transformer.blocks)
    ran = counted(tiny)
    result = run(tiny, store)
    assert result.policy_file is not None
    cost = result.cost
    assert cost.forwards_per_video == BRANCHES * TINY_STEPS
    # where noise is put into the middle blocks they run once more, and are counted as a whole
    assert len(ran) / depth <= cost.forwards < len(ran) / depth + 6
    # warm-up, layers, timed and watched; then the plain run and six with noise, from its step on
    noisy = 3 * (6 + 3) + 2
    assert cost.profile.videos == pytest.approx(0.25 + 3.0 + 1.0 + noisy / TINY_STEPS)
    assert all(stage.seconds > 0.0 for stage in (cost.profile, cost.search, cost.proof))
    searched = [trial.videos for trial in result.trials]
    assert cost.search.videos == pytest.approx(sum(each or 0.0 for each in searched))
    assert searched[0] == 1.0  # two plain videos, of which the profile made one


def test_the_evidence_has_the_figures_of_the_search_apart(tiny: FolderSource, store: Store) -> None:
    result = run(tiny, store)
    assert result.policy_file is not None
    evidence = result.policy_file.evidence
    assert evidence.search is not None
    assert evidence.search.trials == OPTIONS.trials
    assert evidence.quality["psnr"].n == OPTIONS.confirm_prompts
    own = [t for t in result.trials if t.policy == result.policy_file.policy]
    assert own, "the fastest of four trials holds such a floor"
    assert evidence.search.quality == own[0].quality
    assert (evidence.search.speedup, evidence.search.pairs) == (own[0].speedup, 1)


def test_the_next_session_starts_from_what_the_first_one_proved(
    tiny: FolderSource, store: Store
) -> None:
    first = run(tiny, store)
    assert first.policy_file is not None
    assert not any("warm start" in note for note in first.notes)
    assert "warm" not in {trial.source for trial in first.trials}
    proved = first.policy_file.policy
    tiny.call["num_inference_steps"] = 2 * TINY_STEPS
    options = replace(OPTIONS, trials=2)
    cold = run(tiny, store, replace(options, warm_start=False, seed=1))
    assert [trial.source for trial in cold.trials] == ["baseline", "prior"]
    warm = run(tiny, store, options)
    assert [trial.source for trial in warm.trials] == ["baseline", "warm"]
    assert any(f"{proved.id[7:19]} ({TINY_STEPS} steps on" in note for note in warm.notes)
    again = run(tiny, store, replace(options, trials=2))  # the same study: nothing is left to do
    assert again.study == warm.study
    assert again.trials == warm.trials


class Shown:
    """Keeps the last count of each stage."""

    def __init__(self) -> None:
        self.done: dict[Stage, tuple[int, int]] = {}

    def update(self, stage: Stage, done: int, total: int, note: str) -> None:
        self.done[stage] = (done, total)


def test_a_profile_that_took_all_the_time_leaves_one_trial(
    tiny: FolderSource, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meter, "seconds", 3600.0)  # what passed when the search begins
    shown: Any = Shown()
    session = Session(tiny, store, replace(OPTIONS, time_limit_s=3600.0), shown)
    result = session.run(study_storage_url(store.where))
    assert len(result.trials) == 2
    assert shown.done["search"] == (2, OPTIONS.trials)


TIERS = "mine:psnr>=5;never:psnr_worst>=100;draft:psnr>=4"


def test_every_tier_is_searched_with_what_the_ones_before_measured(
    tiny: FolderSource, store: Store
) -> None:
    options = replace(OPTIONS, quality=None, tiers=TIERS)
    result = run(tiny, store, options)
    assert list(result.tiers) == ["mine", "never", "draft"]
    mine, never, draft = result.tiers.values()
    assert [len(tier.trials) for tier in result.tiers.values()] == [4, 4, 4]
    assert (result.study, result.policy_file) == (mine.study, mine.policy_file)
    assert mine.policy_file is not None
    assert draft.policy_file is not None
    assert never.policy_file is None
    assert any("the tier never has no policy: closest" in note for note in result.notes)
    assert not any("warm start" in note for note in result.notes)  # what it proved is known
    whole = {trial.policy.id for trial in mine.trials if trial.state == "complete"}
    assert whole.isdisjoint(trial.policy.id for trial in (*never.trials, *draft.trials))
    assert store.tiers_in_use(mine.policy_file) == ["default", "mine"]
    assert store.tiers_in_use(draft.policy_file) == ["draft"]
    assert draft.policy_file.evidence.search is not None
    assert draft.policy_file.evidence.search.trials > len(draft.trials)
    searched = [t.videos or 0.0 for tier in result.tiers.values() for t in tier.trials]
    assert result.cost.search.videos == pytest.approx(sum(searched))


def test_the_first_tier_alone_becomes_the_default(tiny: FolderSource, store: Store) -> None:
    options = replace(OPTIONS, quality=None, tiers="never:psnr_worst>=100;draft:psnr>=4")
    result = run(tiny, store, options)
    assert (result.policy_file, result.shipped, result.frames) == (None, True, ())
    draft = result.tiers["draft"].policy_file
    assert draft is not None
    assert store.tiers_in_use(draft) == ["draft"]
    assert "what accelerate(pipe) takes without a tier stays as it was" in result.notes[-1]


def test_tiers_share_the_time_that_profile_and_searches_may_take(
    tiny: FolderSource, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Budget] = []
    original = Search.run

    def seen(self: Search, budget: Budget, *rest: Any) -> Any:
        given.append(budget)
        return original(self, budget, *rest)

    monkeypatch.setattr(Search, "run", seen)
    monkeypatch.setattr(Meter, "seconds", 100.0)
    monkeypatch.setattr(Meter, "spent", lambda *_: Spent(seconds=40.0, videos=0.0))
    options = replace(OPTIONS, quality=None, tiers="a:psnr>=5;b:psnr>=4", time_limit_s=3660.0)
    run(tiny, store, options)
    assert [budget.seconds for budget in given] == [1800.0, 3600.0]  # what is left, by trials
    assert [budget.trials for budget in given] == [4, 4]
