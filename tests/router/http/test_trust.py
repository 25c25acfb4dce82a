"""The policy of a request is chosen by who holds the admin key; where there is none, by callers on this machine."""

from __future__ import annotations

import pytest

from pdserve.errors import Forbidden
from router.http.trust import ADMIN_KEY_HEADER, Trust
from router.wishes import Wishes

KEY = b"secret"


@pytest.mark.parametrize(
    ("host", "trusted"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        (None, True),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("localhost", False),
        ("", False),
    ],
)
def test_without_a_key_the_machine_itself_is_trusted(host: str | None, trusted: bool) -> None:
    assert Trust().covers(host, {}) == trusted
    assert Trust().covers(host, {ADMIN_KEY_HEADER: KEY}) == trusted


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.1", None])
def test_with_a_key_nothing_else_counts(host: str | None) -> None:
    assert Trust(KEY).covers(host, {ADMIN_KEY_HEADER: KEY})
    assert not Trust(KEY).covers(host, {ADMIN_KEY_HEADER: b"other"})
    assert not Trust(KEY).covers(host, {})


def test_others_may_not_choose_the_policy() -> None:
    headers = {b"x-pdserve-policy": b"random"}
    with pytest.raises(Forbidden):
        Wishes.from_headers(headers)
    assert Wishes.from_headers(headers, trusted=True).policy == "random"
    assert Wishes.from_headers({}).policy is None


def test_tenants_are_told_apart_by_their_keys_which_are_not_kept() -> None:
    one, other = (Wishes.from_headers({b"authorization": key}) for key in (b"Bearer abc", b"Bearer def"))
    assert len({one.tenant, other.tenant, Wishes().tenant}) == 3
    assert "abc" not in one.tenant
