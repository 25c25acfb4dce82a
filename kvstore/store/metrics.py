"""What a store node exports for Prometheus. Base units; tiers are host, disk and remote."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from kvstore import __version__
from kvstore.store.tier import Tier

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class StoreMetrics:
    """One registry per node."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        build = Info("pdserve_build", "Version of this process.", registry=registry)
        build.info({"version": __version__, "role": "store"})

        def counter(name: str, text: str) -> dict[Tier, Counter]:
            """By tier: to find a child by its label costs more than to count."""
            parent = Counter(f"pdserve_store_{name}", text, ["tier"], registry=registry)
            return {tier: parent.labels(tier.label) for tier in Tier}

        self._hits = counter("hit_blocks_total", "Blocks leased to readers, by the tier that had them.")
        self._misses = Counter(
            "pdserve_store_missed_blocks_total", "Blocks asked for that no tier gave.", registry=registry
        )
        self._evicted = counter("evicted_blocks_total", "Blocks that made room for others.")
        self._corrupt = counter("corrupt_blocks_total", "Blocks dropped because their bytes were wrong.")
        self._fetch_seconds = Histogram(
            "pdserve_store_fetch_seconds",
            "Time to bring blocks into the host tier, a batch.",
            ["tier"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._fetch_bytes = counter("fetch_bytes_total", "Bytes brought into the host tier, by where they came from.")
        self._save_seconds = Histogram(
            "pdserve_store_save_seconds",
            "Time to write blocks, a batch; of the host tier from begin to commit.",
            ["tier"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._save_bytes = counter("save_bytes_total", "Bytes saved.")
        self._not_written = Counter(
            "pdserve_store_unwritten_blocks_total",
            "Blocks meant for disk that were not written, by reason.",
            ["reason"],
            registry=registry,
        )
        self._located = Counter(
            "pdserve_store_index_located_blocks_total",
            "Blocks that the index said another node has.",
            registry=registry,
        )
        self._false = Counter(
            "pdserve_store_index_false_blocks_total",
            "Of those, blocks that the node did not have when it was asked.",
            registry=registry,
        )
        self.blocks = Gauge("pdserve_store_blocks", "Blocks held.", ["tier"], registry=registry)
        self.bytes = Gauge("pdserve_store_bytes", "Bytes held.", ["tier"], registry=registry)
        self.capacity_bytes = Gauge("pdserve_store_capacity_bytes", "Bytes of the tier.", ["tier"], registry=registry)
        self.slots = Gauge("pdserve_store_slots", "Slots of the host tier by state.", ["state"], registry=registry)
        self.write_behind_bytes = Gauge(
            "pdserve_store_write_behind_bytes", "Bytes waiting to be written to disk.", registry=registry
        )
        self.breaker_open = Gauge(
            "pdserve_store_breaker_open", "1 while disk, index or a peer is left alone.", ["target"], registry=registry
        )

    def hit(self, tier: Tier, num_blocks: int) -> None:
        self._hits[tier].inc(num_blocks)

    def missed(self, num_blocks: int) -> None:
        self._misses.inc(num_blocks)

    def evicted(self, tier: Tier, num_blocks: int) -> None:
        self._evicted[tier].inc(num_blocks)

    def corrupt(self, tier: Tier, num_blocks: int = 1) -> None:
        self._corrupt[tier].inc(num_blocks)

    def fetched(self, tier: Tier, num_bytes: int, seconds: float) -> None:
        self._fetch_bytes[tier].inc(num_bytes)
        self._fetch_seconds.labels(tier.label).observe(seconds)

    def saved(self, tier: Tier, num_bytes: int, seconds: float) -> None:
        self._save_bytes[tier].inc(num_bytes)
        self._save_seconds.labels(tier.label).observe(seconds)

    def not_written(self, reason: str, num_blocks: int = 1) -> None:
        self._not_written.labels(reason).inc(num_blocks)

    def located(self, num_blocks: int, num_false: int) -> None:
        self._located.inc(num_blocks)
        self._false.inc(num_false)

    def value(self, name: str, **labels: str) -> float:
        """The current value of a series, 0 where there is none; for the operator's view."""
        return self.registry.get_sample_value(name, labels) or 0.0
