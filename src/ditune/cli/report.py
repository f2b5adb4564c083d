"""`tune report`: write the HTML report of a study again from the database."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ditune.cli import sources
from ditune.db.errors import UsageFault
from ditune.db.records import PolicyFile, Profile, Study

if TYPE_CHECKING:
    from ditune.reports.content import TierShown


def report(
    study: Annotated[
        str | None, typer.Argument(help="A study's name (default: the newest).")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("report.html"),
    db: sources.Database = None,
) -> None:
    """Write the report of a study from what the database holds (frames are only in the first)."""
    from ditune.db.store import Store
    from ditune.reports import page
    from ditune.reports.content import ReportContent

    url = sources.database_url(db)
    with Store.open(url) as store:
        chosen = _choose(store.studies(), study, url)
        settings = chosen.settings
        profile: Profile | None = store.profile(settings.hardware, settings.workload)
        if profile is None:
            raise UsageFault(f"{url} holds no profile for {chosen.name}: run tune profile first")
        proved: dict[str, PolicyFile] = {}
        for each in store.policies():  # the last stored first
            proved.setdefault(each.evidence.study, each)
        content = ReportContent(
            study=chosen,
            profile=profile,
            trials=tuple(store.trials(chosen.name)),
            chosen=proved.get(chosen.name),
            tiers=_tiers(store.studies(), chosen, proved),
        )
    page.write(content, out)
    Console().print(f"wrote {escape(str(out))}")


def _tiers(
    studies: list[Study], chosen: Study, proved: Mapping[str, PolicyFile]
) -> tuple[TierShown, ...]:
    """Return the tiers of the run that a study belongs to, those first that were searched first."""
    from ditune.reports.content import TierShown

    def together(study: Study) -> bool:
        own = {"constraints": chosen.settings.constraints, "space": chosen.settings.space}
        alike = study.settings.model_copy(update=own) == chosen.settings
        return study.tier is not None and alike and study.arguments == chosen.arguments

    return tuple(
        TierShown(str(s.tier), s.settings.constraints, proved.get(s.name))
        for s in studies
        if chosen.tier is not None and together(s)
    )


def _choose(studies: list[Study], name: str | None, url: str) -> Study:
    """Return a study with floors, by default the newest: a curve has a page of its own."""
    curves = {study.name for study in studies if not study.settings.constraints}
    if name in curves:
        raise UsageFault(
            f"{name} is a trade-off curve: run tune curve as it was run before, and it writes its "
            "page again"
        )
    studies = [study for study in studies if study.name not in curves]
    if not studies:
        raise UsageFault(f"{url} holds no study yet: start one with tune run")
    if name is None:
        return max(studies, key=lambda study: study.created_at)
    for study in studies:
        if study.name == name:
            return study
    raise UsageFault(f"{url} holds no study {name!r}; it has {', '.join(s.name for s in studies)}")
