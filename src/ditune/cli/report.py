"""`tune report`: write the HTML report of a study again from the database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ditune.cli import sources
from ditune.db.errors import UsageFault
from ditune.db.records import PolicyFile, Profile, Study


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
        proved: list[PolicyFile] = [p for p in store.policies() if p.evidence.study == chosen.name]
        content = ReportContent(
            study=chosen,
            profile=profile,
            trials=tuple(store.trials(chosen.name)),
            chosen=proved[0] if proved else None,
            frames=(),
            fewer_steps=None,
        )
    page.write(content, out)
    Console().print(f"wrote {escape(str(out))}")


def _choose(studies: list[Study], name: str | None, url: str) -> Study:
    if not studies:
        raise UsageFault(f"{url} holds no study yet: start one with tune run")
    if name is None:
        return max(studies, key=lambda study: study.created_at)
    for study in studies:
        if study.name == name:
            return study
    raise UsageFault(f"{url} holds no study {name!r}; it has {', '.join(s.name for s in studies)}")
