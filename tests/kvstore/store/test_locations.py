"""What Redis says of a node is checked: it may be anything, and is a miss then."""

from __future__ import annotations

import pytest

from kvstore.store.locations import NodeRecord

NODE = NodeRecord(7, "a", "10.0.0.1:1", "h")
RECORD = NODE.to_json().encode()


def test_a_record_survives_the_round_trip() -> None:
    assert NodeRecord.from_json(RECORD, 7) == NODE


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 1000,
        NODE.to_json().encode() + 1024 * b" ",
        NODE.to_json().encode().replace(b"7", b"8"),
    ],
    ids=range(6),
)
def test_a_record_that_is_not_one_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        NodeRecord.from_json(text, 7)
