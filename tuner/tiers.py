"""Tiers: several trade-offs that one run searches and proves, each with floors of its own.

They are written "lossless,high" where their names stand for floors, or with floors:
"mine:psnr>=35,psnr_worst>=27;draft:psnr>=28".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ditune.db.errors import UsageFault
from ditune.db.records import Constraint
from ditune.tuner.quality import parse_constraints

DEFAULT = "default"  # what a lookup takes that names no tier
_MOST = 6  # each costs a search and a proof
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
# 45, 35 and 28 dB are errors of 1.4, 4.5 and 10 of 255 grey levels (root mean square): about what
# 8-bit video rounds away, hardly to be seen, and a draft. The worst prompt may lie 8 dB below, as
# in the floors that our sources bring.
_FLOORS: Mapping[str, Mapping[str, float]] = {
    "lossless": {"psnr": 45.0, "psnr_worst": 37.0, "ssim": 0.98, "ssim_worst": 0.95},
    "high": {"psnr": 35.0, "psnr_worst": 27.0, "ssim": 0.94, "ssim_worst": 0.88},
    "fast": {"psnr": 28.0, "psnr_worst": 20.0, "ssim": 0.88, "ssim_worst": 0.8},
}


@dataclass(frozen=True)
class Tier:
    """One trade-off: the name under which it is looked up, and its floors."""

    name: str
    constraints: tuple[Constraint, ...]


def split_tiers(text: str) -> dict[str, str]:
    """Return the floors of each tier by its name, in order; empty where the name stands for them.

    Raises:
        UsageFault: The text is malformed, names something twice or too much, or a floor cannot be
            read.
    """
    found: dict[str, str] = {}
    for part in text.split(";"):
        name, colon, floors = part.partition(":")
        for each in [name] if colon else part.split(","):
            _add(found, each.strip(), floors.strip() if colon else None)
    if len(found) > _MOST:
        raise UsageFault(f"--tiers lists {len(found)} tiers, and one run searches {_MOST} at most")
    return found


def _add(found: dict[str, str], name: str, floors: str | None) -> None:
    """Add a tier to those that were read before it."""
    require_name(name)
    if name == DEFAULT:
        raise UsageFault(f"a tier cannot be called {DEFAULT!r}: the first one listed becomes it")
    if name in found:
        raise UsageFault(f"--tiers lists {name!r} twice")
    if floors is None and name not in _FLOORS:
        raise UsageFault(
            f"the tier {name!r} needs floors, for example {name}:psnr>=30,psnr_worst>=22; only "
            f"{', '.join(_FLOORS)} stand for some"
        )
    if floors is not None:
        parse_constraints(floors)
    found[name] = floors or ""


def require_name(name: str) -> None:
    """Refuse what cannot be the name of a tier; it is also a part of file names.

    Raises:
        UsageFault: It is empty, too long, or has characters that a name does not have.
    """
    if not _NAME.fullmatch(name):
        raise UsageFault(
            f"{name!r} is no name of a tier: it takes up to 32 letters, digits, - and _; floors go "
            'after a colon and end with ;, for example "high;draft:psnr>=28,psnr_worst>=20"'
        )


def tiers_of(quality: str | None, tiers: str | None, usual: str) -> tuple[Tier, ...]:
    """Return what a run has to find: every tier, or one called "default" where none is asked for.

    Args:
        quality: The floors that the user asks for, without tiers.
        tiers: See `split_tiers`.
        usual: The source's own floors; known names bound the same metrics.

    Raises:
        UsageFault: One of them cannot be read, or both are given.
    """
    if tiers is None:
        return (Tier(DEFAULT, parse_constraints(quality or usual)),)
    require_one(quality, tiers)
    return tuple(
        Tier(name, parse_constraints(floors) if floors else _known(name, usual))
        for name, floors in split_tiers(tiers).items()
    )


def require_one(quality: str | None, tiers: str | None) -> None:
    """Refuse floors beside tiers, which have floors of their own.

    Raises:
        UsageFault: Both are given.
    """
    if quality is not None and tiers is not None:
        raise UsageFault(
            "--quality and --tiers exclude each other: each tier has floors of its own, written "
            "NAME:FLOORS"
        )


def _known(name: str, usual: str) -> tuple[Constraint, ...]:
    """Return the floors that a name stands for, on what a source's own floors bound.

    Raises:
        UsageFault: The source bounds a metric that names say nothing about.
    """
    bounded = parse_constraints(usual)
    strange = [each.name for each in bounded if each.name not in _FLOORS[name]]
    if strange:
        raise UsageFault(
            f"the tier {name!r} stands for floors on psnr and ssim, and this pipeline is judged by "
            f"{', '.join(strange)}: write the floors yourself, {name}:METRIC>=NUMBER"
        )
    return tuple(each.model_copy(update={"floor": _FLOORS[name][each.name]}) for each in bounded)
