from __future__ import annotations

import numpy as np
import pytest

from ditune.db.errors import UsageFault
from ditune.tuner.quality import (
    PSNR_CAP_DB,
    bound_by,
    cases_to_search,
    in_decibels,
    metrics,
    needs_reference,
    parse_constraints,
    summarise,
    values_of,
)


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((3, 32, 32, 3), dtype=np.float32)


def test_floors_are_read() -> None:
    found = parse_constraints("psnr>=35, psnr_worst >= 27,ssim>=0.9")
    assert [c.name for c in found] == ["psnr", "psnr_worst", "ssim"]
    assert [c.floor for c in found] == [35.0, 27.0, 0.9]
    assert needs_reference(found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("psnr", "METRIC>=NUMBER"),
        ("psnr<=3", "METRIC>=NUMBER"),
        ("", "METRIC>=NUMBER"),
        ("psnr>=nan", "METRIC>=NUMBER"),
        ("beauty>=1", "unknown metric 'beauty'"),
        ("psnr>=3,psnr>=4", "bounds the same thing twice"),
    ],
)
def test_bad_floors_are_refused_with_what_to_write(text: str, says: str) -> None:
    with pytest.raises(UsageFault, match=says):
        parse_constraints(text)


def test_psnr_of_a_known_error_and_of_identity() -> None:
    plain = np.full((3, 32, 32, 3), 0.5, dtype=np.float32)
    assert pytest.approx(20.0, abs=1e-3) == metrics()["psnr"].score(plain + 0.1, plain, "")
    assert metrics()["psnr"].score(plain, plain, "") == PSNR_CAP_DB


def test_ssim_is_one_for_identity_and_less_for_noise() -> None:
    plain = noise()
    assert pytest.approx(1.0) == metrics()["ssim"].score(plain, plain, "")
    assert metrics()["ssim"].score(noise(1), plain, "") < 0.5


def test_videos_of_two_shapes_are_refused() -> None:
    with pytest.raises(UsageFault, match="one shape"):
        metrics()["psnr"].score(noise(), noise()[:2], "")


def test_mean_and_worst_and_what_binds() -> None:
    constraints = parse_constraints("psnr>=30,psnr_worst>=20")
    quality = summarise(constraints, [{"psnr": 40.0}, {"psnr": 22.0}])
    assert (quality["psnr"].mean, quality["psnr"].worst, quality["psnr"].n) == (31.0, 22.0, 2)
    assert bound_by(constraints, quality) == "psnr"
    assert (
        bound_by(constraints, summarise(constraints, [{"psnr": 20.5}, {"psnr": 60.0}]))
        == "psnr_worst"
    )


def test_each_metric_is_scored_once() -> None:
    plain = noise()
    assert {"psnr"} == values_of(
        parse_constraints("psnr>=1,psnr_worst>=1"), plain, plain, ""
    ).keys()


def test_the_plain_video_is_scored_once_by_metrics_without_a_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    class Brightness:
        name, needs_reference = "brightness", False

        def score(self, video: np.ndarray, reference: np.ndarray | None, prompt: str) -> float:
            asked.append(float(video.mean()))
            return asked[-1]

    metric = {"brightness": Brightness()}
    monkeypatch.setattr("ditune.tuner.quality.metrics", lambda: metric)
    floors = parse_constraints("brightness>=-1")
    dark, light = np.zeros((1, 2, 2, 3)), np.ones((1, 2, 2, 3))
    kept: dict[str, float] = {}
    for video, expected in ((light, 1.0), (dark, 0.0)):
        assert values_of(floors, video, dark, "", kept) == {"brightness": expected}
    assert asked == [0.0, 1.0, 0.0]
    assert kept == {"brightness": 0.0}


@pytest.mark.parametrize(
    ("floors", "videos"),
    [
        ("psnr>=30", 0),
        ("judge>=0", 32),
        ("judge>=-0.3", 32),
        ("judge>=-0.03,psnr>=30", 34),
        ("judge_digit>=-0.02,judge>=-0.1", 50),
        ("judge>=-0.001", 100),
    ],
)
def test_a_search_lets_one_video_get_worse(floors: str, videos: int) -> None:
    assert cases_to_search(parse_constraints(floors)) == videos


def test_levels_grow_by_ten_where_the_squared_error_falls_to_a_tenth() -> None:
    psnr, ssim = in_decibels("psnr"), in_decibels("ssim")
    assert psnr is not None
    assert ssim is not None
    assert psnr(35.0) == 35.0
    assert ssim(0.999) - ssim(0.99) == pytest.approx(10.0)
    assert ssim(1.0) == 100.0
    assert in_decibels("judge_digit") is None
    assert in_decibels("nobody knows") is None
