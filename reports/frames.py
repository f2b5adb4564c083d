"""Frames as PNG strips inside the page, small enough for a page that is mailed around."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ditune.reports.content import FrameStrip

FRAMES_SHOWN = 8  # per strip, evenly spaced
BUDGET_BYTES = 1_000_000  # of data URIs per page; plotly takes 1.5 MB of the 3 that a page may have
WIDTHS_PX = (320, 240, 160, 120, 96, 64)  # of one frame, from best to smallest
TINY_PX = 128  # frames up to this width are enlarged as squares, so that single pixels are seen


@dataclass(frozen=True)
class ShownStrip:
    """One prompt's frames as two images of the same layout."""

    prompt: str
    before: str  # data URI
    after: str
    frames: int
    width_px: int  # of one frame, as stored in the page
    height_px: int

    @property
    def tiny(self) -> bool:
        """Whether to enlarge without smoothing."""
        return self.width_px <= TINY_PX


def shown_strips(
    strips: Sequence[FrameStrip], budget_bytes: int = BUDGET_BYTES
) -> tuple[ShownStrip, ...]:
    """Return the strips at the largest size at which all fit; else the first ones at the smallest.

    Args:
        strips: Frames [n, height, width, 3] uint8, any size.
        budget_bytes: What all data URIs together may take.
    """
    strips = [strip for strip in strips if len(strip.before) and len(strip.after)]
    shown: tuple[ShownStrip, ...] = ()
    for width in WIDTHS_PX:
        shown = tuple(_within(strips, width, budget_bytes))
        if len(shown) == len(strips):
            return shown
    return shown


def _within(strips: Sequence[FrameStrip], width: int, budget_bytes: int) -> Iterator[ShownStrip]:
    left = budget_bytes
    for strip in strips:
        shown = _shown(strip, width)
        left -= len(shown.before) + len(shown.after)
        if left < 0:
            return
        yield shown


def _shown(strip: FrameStrip, width: int) -> ShownStrip:
    picked = _evenly(min(len(strip.before), len(strip.after)), FRAMES_SHOWN)
    before, after = (_resized(video[picked], width) for video in (strip.before, strip.after))
    return ShownStrip(
        prompt=strip.prompt,
        before=_data_uri(before),
        after=_data_uri(after),
        frames=len(picked),
        width_px=before[0].width,
        height_px=before[0].height,
    )


def _evenly(count: int, wanted: int) -> list[int]:
    return [round(i) for i in np.linspace(0, count - 1, min(count, wanted))]


def _resized(video: np.ndarray, width: int) -> list[Image.Image]:
    images = [Image.fromarray(np.ascontiguousarray(frame)) for frame in video]
    if images[0].width <= width:
        return images
    height = max(1, round(images[0].height * width / images[0].width))
    return [image.resize((width, height), Image.Resampling.LANCZOS) for image in images]


def _data_uri(images: Sequence[Image.Image]) -> str:
    """Return one PNG with the frames side by side, transparent gaps between them."""
    width, height = images[0].size
    gap = max(1, width // 32)
    strip = Image.new("RGBA", (len(images) * (width + gap) - gap, height))
    for place, image in enumerate(images):
        strip.paste(image.convert("RGBA"), (place * (width + gap), 0))
    held = io.BytesIO()
    strip.save(held, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode("ascii")
