"""How long the parts of a call take, and how fast a policy should be by the work it leaves out."""

from __future__ import annotations

from dataclasses import dataclass

from ditune.db.records import Profile
from ditune.profiler.timing import OUTSIDE

_DENOISERS = ("transformer", "transformer_2")  # as a profile names them


@dataclass(frozen=True)
class Parts:
    """Milliseconds of one plain call; what lies outside of all layers is the rest."""

    text_encoder_ms: float
    transformer_ms: float
    decoder_ms: float
    rest_ms: float  # scheduler, hooks, copies, gaps on the host


def parts_of(profile: Profile) -> Parts | None:
    """Return the parts of a profile's calls, None where the transformer was not timed."""
    spent = {layer.name: layer.median_ms * layer.n for layer in profile.layers}
    denoising = sum(spent.get(name, 0.0) for name in _DENOISERS)
    if denoising <= 0.0:
        return None
    found = (
        spent.get("text_encoder", 0.0),
        denoising,
        spent.get("vae.decoder", 0.0),
        spent.get(OUTSIDE, 0.0),
    )
    # layers are timed in a call of their own, with clocks on: their shares count, not their sum
    scale = profile.total_ms / sum(found)
    return Parts(*(scale * part for part in found))


def forwards_of(profile: Profile) -> int:
    """Return how often one plain call runs a denoiser, at least once."""
    counts = {layer.name: layer.n for layer in profile.layers}
    return max(sum(counts.get(name, 0) for name in _DENOISERS), 1)


def speedup_of_work(parts: Parts, work_ratio: float) -> float:
    """Return how fast a call should be if only the transformer's share shrinks with its work.

    Args:
        parts: Of the plain call.
        work_ratio: Blocks asked for / blocks run.
    """
    others = parts.text_encoder_ms + parts.decoder_ms + parts.rest_ms
    return (others + parts.transformer_ms) / (others + parts.transformer_ms / work_ratio)
