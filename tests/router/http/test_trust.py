"""The policy of a request is chosen by who holds the admin key; where there is none, by callers on this machine."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest

from pdserve.errors import Forbidden, Overloaded
from pdserve.request import Request
from pdserve.timeline import Timeline
from router.caller import ANYBODY, Caller
from router.generation import Generation
from router.http.access import Access
from router.http.app import make_app
from router.http.service import Service
from router.http.trust import ADMIN_KEY_HEADER, Trust
from router.wishes import Wishes

KEY = b"secret"
KEYS = [{b"authorization": b"Bearer " + key} for key in (b"abc", b"def")]


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
    assert Trust(KEY).covers(host, {b"authorization": b"Bearer " + KEY})  # as Prometheus sends it


def test_others_may_not_choose_the_policy() -> None:
    headers = {b"x-pdserve-policy": b"random"}
    with pytest.raises(Forbidden):
        Wishes.from_headers(headers, ANYBODY)
    assert Wishes.from_headers(headers, Caller(operator=True)).policy == "random"
    assert Wishes.from_headers({}, ANYBODY).policy is None


def test_tenants_are_told_apart_by_their_keys_which_are_not_kept() -> None:
    access = Access(Trust())
    one, other, none = (access.caller("/v1/models", "10.0.0.1", headers) for headers in (*KEYS, {}))
    assert len({one.turns, other.turns, none.turns}) == 3
    assert "abc" not in one.turns


async def test_elsewhere_on_the_network_the_policy_needs_the_key(service: Service) -> None:
    app = make_app(replace(service, access=Access(Trust(KEY))))
    elsewhere = httpx.ASGITransport(app, client=("10.0.0.1", 1234))
    async with httpx.AsyncClient(transport=elsewhere, base_url="http://test") as client:
        body = {"model": "tiny", "prompt": "hey"}
        headers = {"x-pdserve-policy": "random"}
        refused = await client.post("/v1/completions", json=body, headers=headers)
        assert refused.status_code == 403
        assert refused.json()["error"]["type"] == "permission_error"
        wrong = await client.post("/v1/completions", json=body, headers={**headers, "x-pdserve-admin-key": "wrong"})
        assert wrong.status_code == 403


async def test_a_refusal_says_why_and_when_to_come_back(service: Service) -> None:
    class Refusing:
        def start(self, request: Request, timeline: Timeline, wishes: Wishes) -> Generation:
            raise Overloaded("Too busy.", retry_after_s=7, code="slo_ttft")

    app = make_app(replace(service, dispatcher=Refusing()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "hey"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "7"
    error = response.json()["error"]
    assert (error["type"], error["code"], error["message"]) == ("overloaded_error", "slo_ttft", "Too busy.")
