"""diffusers' TaylorSeer, told which modules to forecast: its defaults match none of Wan's."""

from __future__ import annotations

from functools import partial
from itertools import product

from diffusers import TaylorSeerCacheConfig

from ditune.accel.anatomy import block_lists, denoisers
from ditune.tuner.peers.contract import Setting, cached
from ditune.tuner.source import Source

_INTERVALS = (2, 3, 4, 5, 6, 8)
_ORDERS = (1, 2)
_FROM = 3  # steps at the start that are computed


def settings(source: Source) -> list[Setting]:
    """Return intervals and orders, forecasting inside every block or the whole model (lite)."""
    inside = _modules(source)
    found = []
    for interval, order in product(_INTERVALS, _ORDERS):
        common = {
            "cache_interval": interval,
            "max_order": order,
            "disable_cache_before_step": _FROM,
            "taylor_factors_dtype": next(denoisers(source.pipe)[0].parameters()).dtype,
        }
        lite = TaylorSeerCacheConfig(use_lite_mode=True, **common)
        found.append(
            Setting(f"interval {interval}, order {order}, lite", partial(cached, config=lite))
        )
        if order == 1:
            full = TaylorSeerCacheConfig(cache_identifiers=inside, **common)
            found.append(
                Setting(f"interval {interval}, order {order}", partial(cached, config=full))
            )
    return found


def _modules(source: Source) -> list[str]:
    """Return patterns for attention and feed-forward of every block, as the whole names need."""
    patterns = []
    for name, blocks in block_lists(denoisers(source.pipe)[0]).items():
        parts = [n for n, _ in blocks[0].named_children() if n.startswith(("attn", "ff", "mlp"))]
        patterns.append(rf"^{name}\.\d+\.({'|'.join(parts)})$")
    return patterns
