"""Clips inside the page, read back with the encoder's own decoder."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from ditune.reports.clip import shown_clips, side_by_side
from ditune.reports.content import FrameStrip


def video(shade: int, frames: int = 5, height: int = 32, width: int = 32) -> np.ndarray:
    """Return frames of one shade, the first one black."""
    frames_ = np.full((frames, height, width, 3), shade, dtype=np.uint8)
    frames_[0] = 0
    return frames_


def test_a_clip_shows_both_videos_in_motion(tmp_path: Path) -> None:
    (uri,) = shown_clips([FrameStrip("p", video(60), video(200))])
    assert uri is not None
    path = tmp_path / "clip.mp4"
    path.write_bytes(base64.b64decode(uri.removeprefix("data:video/mp4;base64,")))
    height, width = 320, 2 * 320 + 4
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    shown = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    assert len(shown) == 5
    assert abs(float(shown[-1][:, :310].mean()) - 60) < 4
    assert abs(float(shown[-1][:, -310:].mean()) - 200) < 4
    assert float(shown[0][:, :310].mean()) < 4


def test_large_and_odd_sizes_become_even_and_small() -> None:
    frames = side_by_side(video(9, 3, 481, 833), video(9, 2, 481, 833))
    assert frames.shape == (2, 160, 2 * 278 + 4, 3)


def test_stills_and_what_does_not_fit_have_no_clip() -> None:
    still = FrameStrip("still", video(1, frames=1), video(1, frames=1))
    moving = FrameStrip("moving", video(60), video(200))
    assert shown_clips([still, moving], budget_bytes=100) == (None, None)


def test_without_an_encoder_there_is_no_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    assert shown_clips([FrameStrip("p", video(60), video(200))]) == (None,)
