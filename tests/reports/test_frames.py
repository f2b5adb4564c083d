"""Frames inside the page."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from ditune.reports import frames
from ditune.reports.content import FrameStrip


def noise(count: int, height: int, width: int) -> np.ndarray:
    """Return frames that do not compress."""
    size = (count, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, size=size, dtype=np.uint8)


def decoded(uri: str) -> Image.Image:
    """Return the image of a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))


def test_small_frames_are_kept_exactly() -> None:
    before, after = noise(3, 8, 16), noise(3, 8, 16)[::-1]
    (shown,) = frames.shown_strips([FrameStrip("p", before, after)])
    image = np.asarray(decoded(shown.after).convert("RGB"))
    assert image.shape[:2] == (8, 3 * 16 + 2)  # one transparent column between two frames
    assert np.array_equal(after[1], image[:, 17:33])
    assert shown.tiny
    assert (shown.frames, shown.width_px, shown.height_px) == (3, 16, 8)


def test_long_videos_show_first_and_last() -> None:
    video = noise(81, 4, 4)
    (shown,) = frames.shown_strips([FrameStrip("p", video, video)])
    image = np.asarray(decoded(shown.before).convert("RGB"))
    assert shown.frames == frames.FRAMES_SHOWN
    assert np.array_equal(video[0], image[:, :4])
    assert np.array_equal(video[-1], image[:, -4:])


def test_large_frames_shrink_until_they_fit() -> None:
    video = noise(2, 180, 320)
    (shown,) = frames.shown_strips([FrameStrip("p", video, video)], budget_bytes=400_000)
    assert len(shown.before) + len(shown.after) <= 400_000
    assert shown.width_px < 320
    assert pytest.approx(180 / 320, abs=0.02) == shown.height_px / shown.width_px


def test_what_never_fits_is_left_out() -> None:
    strips = [FrameStrip(f"p{i}", noise(8, 48, 64), noise(8, 48, 64)) for i in range(3)]
    one = sum(map(len, (frames.shown_strips(strips)[0].before,) * 2))
    shown = frames.shown_strips(strips, budget_bytes=one + 100)
    assert [strip.prompt for strip in shown] == ["p0"]


def test_no_frames() -> None:
    empty = noise(0, 4, 4)
    assert frames.shown_strips(()) == ()
    assert frames.shown_strips([FrameStrip("p", empty, empty)]) == ()
