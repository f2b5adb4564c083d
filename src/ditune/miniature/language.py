"""What the miniature can be asked for: digit, colour, motion, and captions that name them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Literal

from ditune.db.errors import UsageFault

COLOURS: dict[str, tuple[float, float, float]] = {  # name -> linear RGB in [0, 1]
    "red": (0.92, 0.10, 0.12),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (0.98, 0.93, 0.15),
    "green": (0.10, 0.80, 0.20),
    "cyan": (0.10, 0.88, 0.92),
    "blue": (0.15, 0.30, 1.00),
    "magenta": (0.93, 0.20, 0.90),
    "white": (0.97, 0.97, 0.97),
}
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking")
DIGITS = tuple(range(10))
COLOUR_NAMES = tuple(COLOURS)
Split = Literal["calibration", "held-out"]
_SHUFFLE_SEED = 20251  # fixes which caption belongs to which split; never change it


@dataclass(frozen=True)
class Subject:
    """What one caption names: a digit, a colour and a motion, each as an index into its table."""

    digit: int
    colour: int
    motion: int

    @property
    def caption(self) -> str:
        """The English caption, for example "a red 3 moving left"."""
        return f"a {COLOUR_NAMES[self.colour]} {self.digit} {MOTIONS[self.motion]}"


def parse(caption: str) -> Subject:
    """Return the subject that a caption names.

    Raises:
        UsageFault: The caption is not of the form "a COLOUR DIGIT MOTION".
    """
    try:
        article, colour, digit, motion = caption.strip().split(" ", 3)
        if article != "a":
            raise ValueError(article)
        return Subject(DIGITS.index(int(digit)), COLOUR_NAMES.index(colour), MOTIONS.index(motion))
    except ValueError:
        raise UsageFault(
            f"the miniature cannot judge {caption!r}: it knows captions such as "
            f'"a red 3 moving left", with the colours {", ".join(COLOUR_NAMES)} '
            f"and the motions {', '.join(MOTIONS)}"
        ) from None


def subjects() -> list[Subject]:
    """Return all 480 subjects, in a fixed order."""
    return [
        Subject(digit, colour, motion)
        for digit, colour, motion in product(DIGITS, range(len(COLOURS)), range(len(MOTIONS)))
    ]


def captions(split: Split) -> list[str]:
    """Return the 240 captions of one split, shuffled once and for all.

    The splits are disjoint: what is searched on "calibration" can be proved on "held-out". Every
    prefix of a split is a fair sample of digits, colours and motions.
    """
    if split not in ("calibration", "held-out"):
        raise UsageFault(f'unknown split {split!r}: it is "calibration" or "held-out"')
    everything = [subject.caption for subject in subjects()]
    Random(_SHUFFLE_SEED).shuffle(everything)
    half = len(everything) // 2
    return everything[:half] if split == "calibration" else everything[half:]
