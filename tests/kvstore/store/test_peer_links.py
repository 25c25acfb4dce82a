"""Links to other nodes: as many as there may be, however many lives of nodes have come and gone."""

from __future__ import annotations

import os

import pytest

from kvstore.store import peer_links
from kvstore.store import store_pb2 as pb
from kvstore.store.geometry import Geometry
from kvstore.store.locations import NodeRecord
from kvstore.store.peer_links import PeerLinks
from kvstore.transfer.loopback import LoopbackNetwork, LoopbackTransport
from tests.kvstore.store.blocks import BLOCK_BYTES, FINGERPRINT


async def test_the_link_used_least_recently_makes_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes without a fixed name have another after each restart; between machines nobody sees the old one go."""
    monkeypatch.setattr(peer_links, "MAX_LINKS", 3)
    network = LoopbackNetwork()
    me, peers = LoopbackTransport(network), LoopbackTransport(network)
    links = PeerLinks(NodeRecord(1, "me", "10.0.0.1:1", "h"), Geometry(FINGERPRINT, BLOCK_BYTES), me, 1.0)

    def connect(name: str) -> pb.ConnectRequest:
        end = peers.open(lambda completion: None, same_host=False)
        return pb.ConnectRequest(
            node_id=name,
            incarnation=2,
            address="10.0.0.2:1",
            host_id="other",
            transport=me.name,
            link_address=end.address,
            fingerprint=FINGERPRINT,
            block_bytes=BLOCK_BYTES,
            pid=os.getpid(),
        )

    for name in ("a", "b", "c"):
        await links.accept(connect(name))
    oldest = links.accepted("b")
    assert oldest is not None
    assert links.accepted("a") is not None
    assert links.accepted("c") is not None
    await links.accept(connect("d"))
    assert oldest.closing is not None
    assert [links.accepted(name) is not None for name in "abcd"] == [True, False, True, True]
    await links.shut_down()
    peers.close()
