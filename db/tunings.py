"""Tiles of expert layers and where they hold: hardware, software, kernels, shape of the layer.

They change no result beyond rounding, so they need no floors and no proof on prompts, and hold for
every pipeline that has a layer of the shape.
"""

from __future__ import annotations

from collections.abc import Sequence

from ditune.db.moe import CpuTiles, MoeShape, MoeTuning
from ditune.db.record import Digest, Record, Timestamp
from ditune.db.records import Hardware, Software


class TunedLayer(Record):
    """A tuning and where it holds.

    Args:
        hardware: What it was measured on or predicted for.
        software: What it was tuned with; what the kernels are made of has to be the same where it
            is used: torch for tiles of a CPU, triton for those of a GPU.
        kernels: Digest of the kernels' sources, which have to be the same too.
        tuning: The tiles.
        created_at: When.
    """

    hardware: Hardware
    software: Software
    kernels: Digest
    tuning: MoeTuning
    created_at: Timestamp

    def differs(self, software: Software, kernels: str) -> str:
        """Return in what it was tuned otherwise, as words; empty where it holds."""
        name = "torch" if isinstance(self.tuning.default, CpuTiles) else "triton"
        then, here = getattr(self.software, name), getattr(software, name)
        found = [f"{name} {then or 'none'} (here {here or 'none'})"] * (then != here)
        found += ["other kernels"] * (self.kernels != kernels)
        return ", ".join(found)


def newest(
    layers: Sequence[TunedLayer], shape: MoeShape, software: Software, kernels: str
) -> tuple[MoeTuning | None, str]:
    """Return the newest tuning of a shape that holds here, or None and why there is none.

    Args:
        layers: What is stored for this hardware, the newest first.
        shape: Of the layer; it has to be the same in everything.
        software: What is installed.
        kernels: Digest of the kernels' sources.
    """
    same = [layer for layer in layers if layer.tuning.shape == shape]
    for layer in same:
        if not layer.differs(software, kernels):
            return layer.tuning, ""
    if same:
        return None, f"it was tuned with {same[0].differs(software, kernels)}"
    return None, "no layer of this shape was tuned on this hardware"
