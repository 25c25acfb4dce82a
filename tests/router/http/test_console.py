"""The console's files arrive with their types, are revalidated, and nothing else on the disk can be reached."""

from __future__ import annotations

import re

import httpx
import pytest

from router.http.console import FOLDER


async def test_page_may_load_from_its_own_origin_only(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert page.headers["x-content-type-options"] == "nosniff"


async def test_all_that_the_page_refers_to_is_served(client: httpx.AsyncClient) -> None:
    references = re.findall(r'(?:href|src)="([^"]+)"', (await client.get("/")).text)
    assert "console/page.css" in references
    for reference in references:
        assert (await client.get(f"/{reference}")).status_code == 200, reference


async def test_unchanged_file_is_not_sent_again(client: httpx.AsyncClient) -> None:
    first = await client.get("/console/page.css")
    assert first.headers["content-type"] == "text/css; charset=utf-8"
    again = await client.get("/console/page.css", headers={"if-none-match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert (await client.get("/console/page.css", headers={"if-none-match": '"other"'})).content == first.content


@pytest.mark.parametrize("name", ["../http/console.py", "%2e%2e/http/console.py", "/etc/passwd", "", "nothing.js"])
async def test_path_outside_the_table_is_not_found(client: httpx.AsyncClient, name: str) -> None:
    assert (FOLDER / "../http/console.py").exists()
    assert (await client.get(f"/console/{name}")).status_code == 404
