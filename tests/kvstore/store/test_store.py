"""The tiers of one node as one store, where nothing of a process is needed to say what holds."""

from __future__ import annotations

import numpy as np

from kvstore.store.host_tier import HostTier
from kvstore.store.store import TieredStore
from tests.kvstore.store.blocks import chain, entries


def test_nothing_is_kept_of_saves_whose_writers_died() -> None:
    host = HostTier(8, 64)
    store = TieredStore(host, [np.zeros(64, np.uint8) for _ in range(8)])
    for life in range(5):
        refs = store.begin_save(f"w{life}", entries(chain(life, 4)))
        assert None not in refs
        host.owner_lost(f"w{life}")
        host.owner_gone(f"w{life}")
    going_on = store.begin_save("w", entries(chain(9, 2)))
    store.sweep()
    assert list(store._begun_s) == going_on
    assert store.commit_save([(ref, 7) for ref in going_on if ref is not None]) == 2
    assert store._begun_s == {}
