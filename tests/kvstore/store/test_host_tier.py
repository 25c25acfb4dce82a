"""The host tier: chains stay whole, slots are freed only by word or proof, the ledger always sums."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from kvstore.keys import BlockKey, block_keys, root_key
from kvstore.store.host_block import Pin, SlotRef
from kvstore.store.host_tier import HostTier

SLOTS = 8
BLOCK_BYTES = 64


def chain(seed: int, length: int) -> list[BlockKey]:
    """Chains with the same seed // 2 share their first block."""
    tokens = [seed // 2, *(seed * 100 + n for n in range(1, length))]
    return block_keys(root_key(b"model"), tokens, 1)


def save(tier: HostTier, keys: list[BlockKey], tenant: str = "", owner: str = "w") -> list[SlotRef]:
    parents = [None, *keys]
    refs = [tier.begin(owner, key, parent, tenant) for key, parent in zip(keys, parents, strict=False)]
    found = [ref for ref in refs if ref is not None]
    for ref in found:
        tier.commit(ref, 7)
    return found


def test_only_committed_blocks_are_found() -> None:
    tier = HostTier(SLOTS, BLOCK_BYTES)
    key = chain(0, 1)[0]
    ref = tier.begin("w", key, None)
    assert ref is not None
    assert tier.match([key]) == 0
    assert tier.begin("other", key, None) is None
    assert tier.commit(ref, 7) is not None
    assert tier.match([key]) == 1


def test_a_leaf_goes_before_its_parent_however_recently_it_was_used() -> None:
    tier = HostTier(3, BLOCK_BYTES)
    keys = chain(0, 3)
    save(tier, keys)
    lease = tier.open_lease("r", 0.0, 1.0)
    assert len(tier.lease(lease, keys)) == 3
    tier.release(lease)
    save(tier, chain(8, 1))
    assert tier.match(keys) == 2


def test_the_least_recently_used_leaf_goes_first() -> None:
    tier = HostTier(3, BLOCK_BYTES)
    first, second, third = (chain(seed, 1) for seed in (0, 2, 4))
    for keys in (first, second, third):
        save(tier, keys)
    lease = tier.open_lease("r", 0.0, 1.0)
    tier.lease(lease, first)
    tier.release(lease)
    save(tier, chain(6, 1))
    assert (tier.match(first), tier.match(second), tier.match(third)) == (1, 0, 1)


def test_a_leased_block_stays_until_released_or_expired() -> None:
    tier = HostTier(1, BLOCK_BYTES)
    key = chain(0, 1)
    save(tier, key)
    lease = tier.open_lease("r", 0.0, 5.0)
    tier.lease(lease, key)
    assert save(tier, chain(2, 1)) == []
    assert tier.expire(4.9) == 0
    assert tier.expire(5.0) == 1
    tier.release(lease)  # late, and nothing is left to release
    assert len(save(tier, chain(2, 1))) == 1
    assert tier.ledger(6.0).idle


def test_a_lost_writers_slot_waits_for_its_process() -> None:
    tier = HostTier(1, BLOCK_BYTES)
    ref = tier.begin("w", chain(0, 1)[0], None)
    assert ref is not None
    assert tier.owner_lost("w") == 1
    tier.expire(1e9)
    assert tier.ledger(1e9).quarantined == 1
    assert tier.begin("other", chain(2, 1)[0], None) is None
    assert tier.owner_gone("w") == 1
    assert tier.ledger(1e9).free == 1
    assert tier.commit(ref, 7) is None


def test_a_lost_writers_word_frees_its_slot_but_publishes_nothing() -> None:
    tier = HostTier(1, BLOCK_BYTES)
    key = chain(0, 1)
    ref = tier.begin("w", key[0], None)
    assert ref is not None
    tier.owner_lost("w")
    assert tier.commit(ref, 7) is None
    assert tier.match(key) == 0
    assert tier.ledger(0.0).free == 1


def test_a_stale_reference_changes_nothing() -> None:
    tier = HostTier(1, BLOCK_BYTES)
    old = tier.begin("w", chain(0, 1)[0], None)
    assert old is not None
    assert tier.abandon(old)
    new = tier.begin("w", chain(2, 1)[0], None)
    assert new is not None
    assert tier.commit(old, 7) is None
    assert not tier.abandon(old)
    assert tier.commit(new, 7) is not None


def test_a_tenant_evicts_its_own_blocks_only() -> None:
    tier = HostTier(4, BLOCK_BYTES, tenant_bytes=2 * BLOCK_BYTES)
    theirs = [chain(seed, 1) for seed in (0, 2)]
    for keys in theirs:
        save(tier, keys, tenant="a")
    mine = [chain(seed, 1) for seed in (4, 6, 8, 10)]
    for keys in mine:
        save(tier, keys, tenant="b")
    assert [tier.match(keys) for keys in theirs] == [1, 1]
    assert [tier.match(keys) for keys in mine] == [0, 0, 1, 1]
    assert tier.tenant_bytes() == {"a": 2 * BLOCK_BYTES, "b": 2 * BLOCK_BYTES}


@pytest.mark.parametrize("tenant_bytes", [0, 2 * BLOCK_BYTES])
def test_what_is_evicted_by_one_order_is_forgotten_by_the_other(tenant_bytes: int) -> None:
    """Without a quota nobody asks for a tenant's own order, under quotas nobody for that of all."""
    tier = HostTier(SLOTS, BLOCK_BYTES, tenant_bytes)
    for seed in range(2000):
        assert save(tier, chain(2 * seed, 1), "ab"[seed % 2])
    orders = [tier._candidates._all, *tier._candidates._of_tenant.values()]
    assert len(tier) == (4 if tenant_bytes else SLOTS)
    assert max(map(len, orders)) <= 64
    assert tier.begin("w", chain(9999, 1)[0], None, "a") is not None


def test_pins() -> None:
    tier = HostTier(2, BLOCK_BYTES)
    hard, soft = chain(0, 1), chain(2, 1)
    save(tier, hard)
    save(tier, soft)
    assert tier.pin(hard[0], Pin.HARD, 10.0)
    assert tier.pin(soft[0], Pin.SOFT, 10.0)
    save(tier, chain(4, 1))  # nothing unpinned is left: the soft pin gives way
    assert (tier.match(hard), tier.match(soft)) == (1, 0)
    tier.expire(10.0)
    save(tier, chain(6, 1))
    save(tier, chain(8, 1))
    assert tier.match(hard) == 0


def test_a_block_dropped_while_it_is_read_frees_its_slot_afterwards() -> None:
    tier = HostTier(1, BLOCK_BYTES)
    key = chain(0, 1)
    save(tier, key)
    lease = tier.open_lease("r", 0.0, 5.0)
    tier.lease(lease, key)
    assert tier.drop(key[0])
    assert tier.match(key) == 0
    assert tier.begin("w", chain(2, 1)[0], None) is None
    tier.release(lease)
    assert tier.ledger(0.0).free == 1


def test_evicting_a_block_takes_what_follows_it() -> None:
    tier = HostTier(SLOTS, BLOCK_BYTES)
    keys = chain(0, 5)
    save(tier, keys)
    assert set(tier.evict_with_descendants([keys[2]])) == set(keys[2:])
    assert tier.match(keys) == 2


class HostTierMachine(RuleBasedStateMachine):
    """Any order of events by two writers and readers that come, go and die."""

    writes = Bundle("writes")
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.tier = HostTier(SLOTS, BLOCK_BYTES, tenant_bytes=5 * BLOCK_BYTES)
        self.now_s = 0.0
        self.generations: dict[int, int] = {}
        self.reading: dict[int, list[tuple[BlockKey, SlotRef]]] = {}
        self.may_write: dict[SlotRef, str] = {}  # by processes that live

    @rule(target=writes, seed=st.integers(0, 5), length=st.integers(1, 6), owner=st.sampled_from("ab"))
    def begin(self, seed: int, length: int, owner: str) -> object:
        keys = chain(seed, length)
        tenant = "t" if seed % 2 else ""
        refs = []
        for key, parent in zip(keys, [None, *keys], strict=False):
            ref = self.tier.begin(owner, key, parent, tenant)
            if ref is not None:
                assert ref.generation > self.generations.get(ref.slot, 0)
                assert all(ref.slot != other.slot for other in self.may_write), "somebody may still write there"
                assert all(ref.slot != held.slot for run in self.reading.values() for _, held in run)
                self.generations[ref.slot] = ref.generation
                self.may_write[ref] = owner
                refs.append(ref)
        return multiple(*refs)

    @rule(ref=consumes(writes))
    def commit(self, ref: SlotRef) -> None:
        self.tier.commit(ref, 7)
        self.may_write.pop(ref, None)

    @rule(ref=consumes(writes))
    def abandon(self, ref: SlotRef) -> None:
        self.tier.abandon(ref)
        self.may_write.pop(ref, None)

    @rule(target=leases, seed=st.integers(0, 5), owner=st.sampled_from("ab"))
    def lease(self, seed: int, owner: str) -> int:
        lease = self.tier.open_lease(owner, self.now_s, self.now_s + 3)
        self.reading[lease] = [(block.key, block.ref) for block in self.tier.lease(lease, chain(seed, 6))]
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: int) -> None:
        self.tier.release(lease)
        self.reading.pop(lease, None)

    @rule(owner=st.sampled_from("ab"))
    def session_lost(self, owner: str) -> None:
        self.tier.owner_lost(owner)
        self._forget_leases()

    @rule(owner=st.sampled_from("ab"))
    def process_gone(self, owner: str) -> None:
        self.tier.owner_lost(owner)
        self.tier.owner_gone(owner)
        self.may_write = {ref: who for ref, who in self.may_write.items() if who != owner}
        self._forget_leases()

    def _forget_leases(self) -> None:
        held = self.tier.ledger(self.now_s).leases
        if len(held) < len(self.reading):  # some ended with their owner; the model need not know which
            self.reading = {lease: run for lease, run in self.reading.items() if lease in self.tier._leases}

    @rule(seconds=st.sampled_from([0.5, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.tier.expire(self.now_s)
        self._forget_leases()

    @rule(seed=st.integers(0, 5), pin=st.sampled_from(Pin))
    def pin(self, seed: int, pin: Pin) -> None:
        self.tier.pin(chain(seed, 1)[0], pin, self.now_s + 2)

    @rule(seed=st.integers(0, 5), n=st.integers(0, 5))
    def drop(self, seed: int, n: int) -> None:
        self.tier.drop(chain(seed, 6)[n])

    @invariant()
    def ledger_sums(self) -> None:
        ledger = self.tier.ledger(self.now_s)
        assert ledger.sums, ledger
        assert ledger.writing + ledger.quarantined >= len(self.may_write)

    @invariant()
    def what_is_leased_is_still_there(self) -> None:
        for run in self.reading.values():
            for _, ref in run:
                assert self.tier._by_slot[ref.slot].ref == ref

    @invariant()
    def nobody_is_over_quota(self) -> None:
        assert self.tier.tenant_bytes().get("t", 0) <= 5 * BLOCK_BYTES

    def teardown(self) -> None:
        for owner in "ab":
            self.tier.owner_lost(owner)
            self.tier.owner_gone(owner)
        assert self.tier.ledger(self.now_s).idle


HostTierMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestHostTierMachine = HostTierMachine.TestCase
