"""ditune: profile, tune and replay acceleration policies for diffusion transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditune import miniature as miniature
    from ditune.accel.apply import accelerate as accelerate
    from ditune.accel.experts import accelerate_experts as accelerate_experts
    from ditune.accel.fingerprint import detect as detect
    from ditune.accel.lookup import lookup as lookup
    from ditune.db.policy import Policy as Policy
    from ditune.db.records import Match as Match
    from ditune.profiler.record import profile as profile
    from ditune.tuner.live import tune as tune
    from ditune.tuner.live import tune_tiers as tune_tiers

__version__ = "0.1.0"
__all__ = [
    "Match",
    "Policy",
    "__version__",
    "accelerate",
    "accelerate_experts",
    "detect",
    "lookup",
    "miniature",
    "profile",
    "tune",
    "tune_tiers",
]

_PUBLIC = {  # name -> where it lives; loaded on first use
    "Match": "ditune.db.records",
    "Policy": "ditune.db.records",
    "accelerate": "ditune.accel.apply",
    "accelerate_experts": "ditune.accel.experts",
    "detect": "ditune.accel.fingerprint",
    "lookup": "ditune.accel.lookup",
    "profile": "ditune.profiler.record",
    "tune": "ditune.tuner.live",
    "tune_tiers": "ditune.tuner.live",
}


def __getattr__(name: str) -> object:
    """Load a public name when it is first asked for, so that `import ditune` stays light."""
    if name == "miniature":
        return import_module("ditune.miniature")
    if name not in _PUBLIC:
        raise AttributeError(f"ditune has no {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """Return every public name, loaded or not, for completion at a prompt."""
    return sorted({*globals(), *__all__})
