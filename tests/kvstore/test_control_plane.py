"""With TLS, only processes with a certificate of the deployment's authority hear each other, in both directions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
import trustme
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvstore.control_plane import IN_THE_CLEAR, ControlPlane, MutualTls, control_plane
from kvstore.errors import Unavailable
from tests.support.certificates import write_certificates


@pytest.fixture(scope="module")
def ours() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def folder(tmp_path: Path, ours: trustme.CA) -> Path:
    return write_certificates(tmp_path / "ours", ours)


@pytest.fixture
async def address(folder: Path) -> AsyncIterator[str]:
    """Of a server with TLS."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)  # type: ignore[attr-defined]
    port = MutualTls(folder).listen(server, "127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def asks(plane: ControlPlane, address: str) -> bool:
    """Whether a call through a new channel gets its answer."""
    # Channels with equal arguments share connections unless each has a pool of its own.
    async with plane.channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise
        return True


async def test_processes_of_one_authority_hear_each_other(tmp_path: Path, ours: trustme.CA, address: str) -> None:
    assert await asks(MutualTls(write_certificates(tmp_path / "another", ours)), address)


async def test_nobody_else_is_heard(tmp_path: Path, ours: trustme.CA, address: str) -> None:
    foreign = trustme.CA()
    assert not await asks(IN_THE_CLEAR, address)
    assert not await asks(MutualTls(write_certificates(tmp_path / "foreign", foreign)), address)
    # One that knows our authority and so trusts us, but has no certificate of it.
    mixed = write_certificates(tmp_path / "mixed", foreign)
    ours.cert_pem.write_to_path(str(mixed / "ca.crt"))
    assert not await asks(MutualTls(mixed), address)


async def test_a_server_of_another_authority_or_name_is_not_talked_to(tmp_path: Path, ours: trustme.CA) -> None:
    for number, (authority, name) in enumerate(((trustme.CA(), "pdserve"), (ours, "elsewhere"))):
        theirs = write_certificates(tmp_path / f"server-{number}", authority, name)
        ours.cert_pem.write_to_path(str(theirs / "ca.crt"))  # it would take us
        server = grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)  # type: ignore[attr-defined]
        port = MutualTls(theirs).listen(server, "127.0.0.1:0")
        await server.start()
        assert not await asks(MutualTls(write_certificates(tmp_path / "client", ours)), f"127.0.0.1:{port}")
        await server.stop(None)


async def test_renewed_certificates_are_used_from_the_next_connection(folder: Path, address: str) -> None:
    client = MutualTls(folder)
    assert await asks(client, address)
    write_certificates(folder, trustme.CA())
    assert await asks(client, address), "both ends read the new authority and their new certificates"


async def test_files_that_are_missing_amid_a_renewal_end_no_server(folder: Path, address: str) -> None:
    client = MutualTls(folder)
    key = (folder / "tls.key").read_bytes()
    (folder / "tls.key").unlink()
    with pytest.raises(Unavailable, match=r"tls\.key"):
        client.channel(address, [])
    (folder / "tls.key").write_bytes(key)
    assert await asks(client, address)


def test_what_cannot_be_used_is_told_at_the_start(folder: Path, tmp_path: Path) -> None:
    assert control_plane(None) is IN_THE_CLEAR
    with pytest.raises(Unavailable, match=r"tls\.key"):
        control_plane(tmp_path / "nowhere")
    (folder / "tls.key").chmod(0o644)
    with pytest.raises(Unavailable, match="chmod 600"):
        control_plane(folder)
