"""Every peer by name, in the order of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ditune.tuner.peers import (
    db_cache,
    first_block,
    indicator_rules,
    mag,
    plain,
    sea,
    taylor_seer,
)
from ditune.tuner.peers.contract import Setting
from ditune.tuner.source import Source

PEERS: Mapping[str, Callable[[Source], list[Setting]]] = MappingProxyType(
    {
        "fewer steps": plain.settings,
        "FirstBlockCache": first_block.settings,
        "MagCache": mag.settings,
        "SeaCache": sea.settings,
        "TaylorSeer": taylor_seer.settings,
        "DBCache": db_cache.thresholds,
        "DBCache + TaylorSeer": db_cache.forecasts,
        "DBCache masks": db_cache.masks,
        "rule after TeaCache": indicator_rules.timestep,
        "rule after EasyCache": indicator_rules.latent,
    }
)
