"""How tiers are written, and what their names stand for."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditune.db.errors import UsageFault
from ditune.tuner.quality import parse_constraints
from ditune.tuner.tiers import require_name, split_tiers, tiers_of

USUAL = "psnr>=30,psnr_worst>=22,ssim>=0.9"
KNOWN = ("lossless", "high", "fast")
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", fullmatch=True).filter(
    lambda name: name != "default"
)
FLOORS = st.sampled_from(["psnr>=35", "psnr>=35,psnr_worst>=27", "ssim>=0.9", "judge>=-0.03"])


@given(st.dictionaries(NAMES, FLOORS, min_size=1, max_size=6), st.sampled_from(["", " ", "  "]))
def test_what_is_written_is_read_in_order(tiers: dict[str, str], space: str) -> None:
    text = f"{space};{space}".join(f"{name}{space}:{space}{f}" for name, f in tiers.items())
    assert list(split_tiers(text).items()) == list(tiers.items())
    found = tiers_of(None, text, USUAL)
    assert [(tier.name, tier.constraints) for tier in found] == [
        (name, parse_constraints(floors)) for name, floors in tiers.items()
    ]


@given(st.lists(st.sampled_from(KNOWN), min_size=1, unique=True), st.sampled_from([",", ";", ", "]))
def test_names_that_are_known_need_no_floors(names: list[str], separator: str) -> None:
    assert split_tiers(separator.join(names)) == dict.fromkeys(names, "")


def test_names_and_floors_may_be_mixed() -> None:
    found = tiers_of(None, "lossless,high;mine:psnr>=33,ssim>=0.9;fast", USUAL)
    assert [tier.name for tier in found] == ["lossless", "high", "mine", "fast"]
    assert found[2].constraints == parse_constraints("psnr>=33,ssim>=0.9")


def test_a_name_bounds_what_the_source_bounds_and_each_asks_for_less_than_the_one_before() -> None:
    usual = parse_constraints(f"{USUAL},ssim_worst>=0.8")
    found = tiers_of(None, ",".join(KNOWN), f"{USUAL},ssim_worst>=0.8")
    for tier in found:
        assert [c.name for c in tier.constraints] == [c.name for c in usual]
    for stricter, looser in pairwise(found):
        pairs = zip(stricter.constraints, looser.constraints, strict=True)
        assert all(strict.floor > loose.floor for strict, loose in pairs)
    assert found[1].constraints[0].floor == 35.0


def test_a_known_name_may_have_floors_of_its_own() -> None:
    (tier,) = tiers_of(None, "lossless:psnr>=60", USUAL)
    assert tier.constraints == parse_constraints("psnr>=60")


def test_without_tiers_there_is_one() -> None:
    assert tiers_of(None, None, USUAL)[0].constraints == parse_constraints(USUAL)
    (tier,) = tiers_of("psnr>=40", None, USUAL)
    assert (tier.name, tier.constraints) == ("default", parse_constraints("psnr>=40"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is no name of a tier"),
        ("high,", "'' is no name of a tier"),
        ("high;", "'' is no name of a tier"),
        ("../up:psnr>=30", "'../up' is no name of a tier"),
        ("a" * 33 + ":psnr>=30", "is no name of a tier"),
        ("high,mine:psnr>=30", "'high,mine' is no name of a tier"),
        ("mine", "the tier 'mine' needs floors, for example mine:psnr>=30"),
        ("mine:", "cannot read the quality floor"),
        ("mine:psnr>30", "cannot read the quality floor"),
        ("mine:magic>=1", "unknown metric 'magic'"),
        ("high,high", "lists 'high' twice"),
        ("a:psnr>=30;a:psnr>=20", "lists 'a' twice"),
        ("default:psnr>=30", "cannot be called 'default'"),
        (";".join(f"t{n}:psnr>=3{n}" for n in range(7)), "lists 7 tiers"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, says: str) -> None:
    with pytest.raises(UsageFault, match=says.replace("?", r"\?")):
        split_tiers(text)


def test_floors_beside_tiers_are_refused() -> None:
    with pytest.raises(UsageFault, match="--quality and --tiers exclude each other"):
        tiers_of("psnr>=30", "high", USUAL)


@pytest.mark.parametrize("usual", ["judge>=-0.03", "psnr>=30,clip>=-0.01"])
def test_a_name_says_nothing_about_other_metrics(usual: str) -> None:
    other = usual.split(",")[-1].partition(">")[0]
    with pytest.raises(UsageFault, match=rf"judged by {other}: write the floors yourself, high:"):
        tiers_of(None, "high", usual)
    assert tiers_of(None, f"high:{usual}", usual)


@pytest.mark.parametrize("name", ["default", "a", "A_b-9", "9"])
def test_names_are_part_of_file_names(name: str) -> None:
    require_name(name)
    with pytest.raises(UsageFault, match="is no name of a tier"):
        require_name(f"{name}/{name}")
