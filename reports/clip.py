"""Two videos side by side as one small H.264 clip inside the page: motion is judged in motion."""

from __future__ import annotations

import base64
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from ditune.reports.content import FrameStrip

BUDGET_BYTES = 400_000  # of data URIs per page
_WIDTH_PX = 320  # of one side; tiny frames are enlarged to about this, large ones lose pixels
_FRAMES_PER_S = "8"  # pipelines do not say how fast their frames are meant to be shown
_GAP_PX = 4
_GAP_SHADE = 128
_H264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "20", "-movflags", "+faststart"]


def shown_clips(
    strips: Sequence[FrameStrip], budget_bytes: int = BUDGET_BYTES
) -> tuple[str | None, ...]:
    """Return a clip for each prompt as a data URI, None where it is a still or does not fit.

    Args:
        strips: Frames [n, height, width, 3] uint8, any size.
        budget_bytes: What all data URIs together may take.
    """
    shown: list[str | None] = []
    for strip in strips:
        clip = _data_uri(strip) if min(len(strip.before), len(strip.after)) > 1 else None
        if clip is not None and len(clip) > budget_bytes:
            clip = None
        budget_bytes -= len(clip or "")
        shown.append(clip)
    return tuple(shown)


def _data_uri(strip: FrameStrip) -> str | None:
    """Return the clip of a prompt, None where this platform has no encoder: stills show it too."""
    frames = side_by_side(strip.before, strip.after)
    height, width = frames.shape[1:3]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", _FRAMES_PER_S]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        try:
            encoder = imageio_ffmpeg.get_ffmpeg_exe()
            command = [encoder, "-v", "error", *raw, "-i", "-", *_H264, str(path)]
            subprocess.run(command, input=frames.tobytes(), capture_output=True, check=True)
        except (RuntimeError, OSError, subprocess.SubprocessError):
            return None
        data = path.read_bytes()
    return "data:video/mp4;base64," + base64.b64encode(data).decode("ascii")


def side_by_side(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return [n, height, width, 3] with `before` left and `after` right of a grey gap.

    Frames narrower than 320 pixels are enlarged by a whole factor, pixel for pixel; wider ones are
    thinned out. Sides come out even, as the encoder asks.
    """
    count = min(len(before), len(after))
    pair = [_fitted(video[:count]) for video in (before, after)]
    gap = np.full((*pair[0].shape[:2], _GAP_PX, 3), _GAP_SHADE, dtype=np.uint8)
    return np.concatenate([pair[0], gap, pair[1]], axis=2)


def _fitted(video: np.ndarray) -> np.ndarray:
    width = video.shape[2]
    if width < _WIDTH_PX:
        factor = max(1, _WIDTH_PX // width)
        video = video.repeat(factor, axis=1).repeat(factor, axis=2)
    else:
        stride = -(-width // _WIDTH_PX)
        video = video[:, ::stride, ::stride]
    height, width = (side - side % 2 for side in video.shape[1:3])
    return video[:, : max(height, 2), : max(width, 2)]
