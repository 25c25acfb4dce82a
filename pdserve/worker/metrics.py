"""What a worker exports for Prometheus. Base units; the block gauge has one series per state of the ledger."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from kvstore.pool import Ledger
from kvstore.store.tier import Tier
from pdserve import __version__
from pdserve.protocol import worker_pb2 as pb
from pdserve.worker.engine_thread import StepReport

# Supersets of the buckets that vLLM has for transfers of its NIXL connector; bytes from 2 KiB to 8 GiB.
_TRANSFER_SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_TRANSFER_BYTES = tuple(2**power for power in range(11, 34, 2))
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class WorkerMetrics:
    """One registry per worker process."""

    def __init__(self, role: str) -> None:
        self.registry = registry = CollectorRegistry()
        self._build = Info("pdserve_build", "Version of this process.", registry=registry)
        self.set_role(role)
        self._step_seconds = Histogram(
            "pdserve_step_seconds", "Time of one engine step.", registry=registry, buckets=_SECONDS
        )
        self._step_tokens = Histogram(
            "pdserve_step_tokens",
            "Tokens computed in one engine step.",
            registry=registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
        )
        self._tokens = Counter("pdserve_computed_tokens_total", "Tokens whose KV was computed.", registry=registry)
        self._output_tokens = Counter("pdserve_sampled_tokens_total", "Output tokens sampled.", registry=registry)
        self._failed_steps = Counter("pdserve_failed_steps_total", "Steps that raised an error.", registry=registry)
        self._drafted = Counter(
            "pdserve_drafted_tokens_total", "Tokens of drafts that decode steps checked.", registry=registry
        )
        self._accepted = Counter(
            "pdserve_accepted_draft_tokens_total", "Tokens of drafts that were right.", registry=registry
        )
        self._drafts_before = (0, 0)
        self._preempted = Counter(
            "pdserve_preempted_sequences_total", "Sequences that lost their blocks and start over.", registry=registry
        )
        self._preempted_before = 0
        self._sequences = Gauge("pdserve_sequences", "Sequences by state.", ["state"], registry=registry)
        self._waiting_tokens = Gauge(
            "pdserve_waiting_tokens", "Prompt tokens queued and not yet computed.", registry=registry
        )
        self._blocks = Gauge("pdserve_kv_blocks", "Blocks of the KV pool by state.", ["state"], registry=registry)
        self._kv_usage = Gauge(
            "pdserve_kv_usage_ratio", "Share of the KV pool that is neither free nor cached, 0 to 1.", registry=registry
        )
        self._pool = Info("pdserve_kv_pool", "Blocks of the pool, and tokens and bytes of one.", registry=registry)
        self._overdue = Gauge(
            "pdserve_kv_holds_overdue", "Holds on blocks whose deadline has passed; stays at 0.", registry=registry
        )
        self._transfer_seconds = Histogram(
            "pdserve_transfer_seconds",
            "Time from the ticket until all blocks of a hand-over were verified.",
            registry=registry,
            buckets=_TRANSFER_SECONDS,
        )
        self._transfer_size = Histogram(
            "pdserve_transfer_size_bytes",
            "Bytes of a hand-over, what the receiver had already left out.",
            registry=registry,
            buckets=_TRANSFER_BYTES,
        )
        self.transfer_bytes = Counter(
            "pdserve_transfer_bytes_total", "Bytes of blocks moved.", ["direction"], registry=registry
        )
        self.transfer_failures = Counter(
            "pdserve_transfer_failures_total", "Hand-overs that failed, by reason.", ["reason"], registry=registry
        )
        self.late_landings = Counter(
            "pdserve_late_landings_total", "Messages that landed for a request that was over.", registry=registry
        )

        self.fetch_seconds = Histogram(
            "pdserve_store_fetch_seconds",
            "Time from the plan to load blocks from the store until they were in the pool.",
            registry=registry,
            buckets=_SECONDS,
        )
        self._fetched_blocks = Counter(
            "pdserve_store_fetched_blocks_total", "Blocks loaded from the store, by tier.", ["tier"], registry=registry
        )
        self._fetched_bytes = Counter(
            "pdserve_store_fetched_bytes_total", "Bytes loaded from the store, by tier.", ["tier"], registry=registry
        )
        self.corrupt_blocks = Counter(
            "pdserve_store_corrupt_blocks_total", "Loaded blocks that failed their checksum.", registry=registry
        )
        self.save_bytes = Counter("pdserve_store_saved_bytes_total", "Bytes written to the store.", registry=registry)
        self.save_dropped = Counter(
            "pdserve_store_save_dropped_blocks_total", "Blocks that a full backlog left out.", registry=registry
        )
        self.save_backlog = Gauge(
            "pdserve_store_save_backlog_blocks", "Blocks that wait to be written to the store.", registry=registry
        )

    def set_role(self, role: str) -> None:
        self._build.info({"version": __version__, "role": role})

    def set_pool(self, hello: pb.WorkerHello) -> None:
        sizes = {"block_size": hello.block_size, "num_blocks": hello.num_blocks, "block_bytes": hello.block_bytes}
        self._pool.info({name: str(value) for name, value in sizes.items()})

    def on_received(self, elapsed_s: float, num_bytes: int) -> None:
        """All blocks of a hand-over came, and are verified."""
        self._transfer_seconds.observe(elapsed_s)
        self._transfer_size.observe(num_bytes)
        self.transfer_bytes.labels("received").inc(num_bytes)

    def on_load(self, tiers: Sequence[Tier], block_bytes: int, elapsed_s: float) -> None:
        """Blocks from these tiers are in the pool now."""
        if tiers:
            self.fetch_seconds.observe(elapsed_s)
        for tier, count in Counts(tiers).items():
            self._fetched_blocks.labels(tier.label).inc(count)
            self._fetched_bytes.labels(tier.label).inc(count * block_bytes)

    def on_step(self, report: StepReport) -> None:
        if report.num_tokens:
            self._step_seconds.observe(report.step_s)
            self._step_tokens.observe(report.num_tokens)
            self._tokens.inc(report.num_tokens)
            self._output_tokens.inc(len(report.tokens))
        if report.failed:
            self._failed_steps.inc()
        self._preempted.inc(report.load.preempted - self._preempted_before)
        self._preempted_before = report.load.preempted
        self._drafted.inc(report.load.drafted - self._drafts_before[0])
        self._accepted.inc(report.load.accepted - self._drafts_before[1])
        self._drafts_before = (report.load.drafted, report.load.accepted)
        self._sequences.labels("waiting").set(report.load.waiting_sequences)
        self._sequences.labels("running").set(report.load.running_sequences)
        self._waiting_tokens.set(report.load.waiting_tokens)

    def on_ledger(self, ledger: Ledger) -> None:
        for state in ("free", "cached", "held", "sending", "receiving", "quarantined"):
            self._blocks.labels(state).set(getattr(ledger, state))
        self._kv_usage.set(1 - (ledger.free + ledger.cached) / ledger.total)
        self._overdue.set(len(ledger.overdue))
