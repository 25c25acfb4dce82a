"""`pdserve kv ls|stat|evict|pin|verify`: a store node's blocks, asked for over its Unix socket."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pdserve.errors import ConfigError

if TYPE_CHECKING:
    from kvstore.store.store_pb2_grpc import StoreOperatorStub

_TIMEOUT_S = 10.0
_VERIFY_TIMEOUT_S = 3600.0
_MAX_REPLY_BYTES = 64 << 20

Socket = Annotated[Path, typer.Option("--socket", help="The store node's Unix socket; `pdserve store` tells it.")]
Keys = Annotated[list[str], typer.Argument(metavar="KEY...", help="Block keys in hex, as `ls` prints them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    @app.command("stat")
    def stat(socket: Socket, as_json: AsJson = False) -> None:
        """What a store node holds, tier by tier, and how it is doing."""
        reply = _call(socket, lambda stub, pb: stub.Stat(pb.StatRequest(), timeout=_TIMEOUT_S))
        if as_json:
            print(json.dumps(_to_json(reply), indent=2))
        else:
            _show_stat(reply)

    @app.command("ls")
    def ls(
        socket: Socket,
        limit: Annotated[int, typer.Option(help="Print at most so many.")] = 1000,
        as_json: AsJson = False,
    ) -> None:
        """The blocks of a store node: host tier first, then disk."""
        reply = _call(socket, lambda stub, pb: stub.List(pb.ListRequest(limit=limit), timeout=_TIMEOUT_S))
        blocks = [
            {
                "key": block.key.hex(),
                "parent": block.parent.hex(),
                "tier": {1: "host", 2: "disk"}.get(block.tier, "?"),
                "leases": block.leases,
                "tenant": block.tenant,
                "pin": block.pin,
            }
            for block in reply.blocks
        ]
        if as_json:
            print(json.dumps(blocks, indent=2))
            return
        for block in blocks:
            print(*(block[name] or "-" for name in ("key", "parent", "tier", "tenant", "pin")), block["leases"])

    @app.command("evict")
    def evict(
        socket: Socket,
        keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY...]", help="Block keys in hex.")] = None,
        everything: Annotated[bool, typer.Option("--all", help="Everything that nobody holds.")] = False,
        tier: Annotated[str, typer.Option(help="Only in this tier: host or disk.")] = "",
    ) -> None:
        """Evict blocks and what follows them, where nobody holds them."""
        if bool(keys) == everything:
            raise ConfigError("Say which blocks to evict, or --all.")
        if tier not in ("", "host", "disk"):
            raise ConfigError(f"--tier is host or disk, not {tier}.")
        number = {"": 0, "host": 1, "disk": 2}[tier]
        joined = _join(keys or [])
        reply = _call(
            socket,
            lambda stub, pb: stub.Evict(pb.EvictRequest(keys=joined, all=everything, tier=number), timeout=_TIMEOUT_S),
        )
        print(f"{reply.evicted} blocks evicted")

    @app.command("pin")
    def pin(
        socket: Socket,
        keys: Keys,
        hard: Annotated[bool, typer.Option("--hard", help="Never evict; without it: evict after all others.")] = False,
        seconds: Annotated[float, typer.Option(help="For how long; 0 unpins.")] = 3600.0,
    ) -> None:
        """Keep blocks in the host tier."""
        joined = _join(keys)
        reply = _call(
            socket,
            lambda stub, pb: stub.Pin(pb.PinRequest(keys=joined, hard=hard, expires_s=seconds), timeout=_TIMEOUT_S),
        )
        print(f"{reply.pinned} of {len(keys)} blocks {'pinned' if seconds > 0 else 'unpinned'}")

    @app.command("verify")
    def verify(socket: Socket) -> None:
        """Read every block and drop those whose bytes are wrong; exit 1 if there were any."""
        reply = _call(socket, lambda stub, pb: stub.Verify(pb.VerifyRequest(), timeout=_VERIFY_TIMEOUT_S))
        print(f"{reply.verified} blocks verified, {reply.corrupt} were corrupt and are dropped")
        raise typer.Exit(1 if reply.corrupt else 0)


def _call(socket: Path, ask: Callable[[StoreOperatorStub, Any], Any]) -> Any:
    """One call. gRPC is imported here: the other commands start faster without it."""
    import grpc

    from kvstore.store import store_pb2
    from kvstore.store.config import operator_socket
    from kvstore.store.store_pb2_grpc import StoreOperatorStub

    options = (("grpc.max_receive_message_length", _MAX_REPLY_BYTES),)
    with grpc.insecure_channel(f"unix:{operator_socket(socket.absolute())}", options=options) as channel:
        try:
            return ask(StoreOperatorStub(channel), store_pb2)
        except grpc.RpcError as error:
            told: Any = error  # every error of a call is a grpc.Call too, which its type does not say
            raise ConfigError(f"The store node at {socket} does not do that: {told.details()}.") from error


def _join(keys: Sequence[str]) -> bytes:
    try:
        found = [bytes.fromhex(key) for key in keys]
    except ValueError as error:
        raise ConfigError(f"A block key is 32 hex digits: {error}.") from error
    if any(len(key) != 16 for key in found):
        raise ConfigError("A block key is 32 hex digits.")
    return b"".join(found)


def _to_json(reply: Any) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    value: dict[str, Any] = MessageToDict(
        reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {**value, "fingerprint": reply.fingerprint.hex()}


def _show_stat(reply: Any) -> None:
    print(f"store node {reply.node_id} at {reply.address}, blocks of {reply.block_bytes} bytes")
    table = Table("tier", "blocks", "MiB", "of MiB", "hits", "evicted", "corrupt", "breaker", box=None)
    for tier in reply.tiers:
        sizes = [str(size >> 20) for size in (tier.bytes, tier.capacity_bytes)]
        counts = [str(count) for count in (tier.hits, tier.evictions, tier.corrupt)]
        table.add_row(tier.tier, str(tier.blocks), *sizes, *counts, tier.breaker)
    Console().print(table)
    print("slots:", ", ".join(f"{count} {name}" for name, count in sorted(reply.slots.items())) or "none")
    print(f"misses: {reply.misses}, waiting for the disk: {reply.write_behind_bytes >> 20} MiB")
    for problem in reply.problems:
        print(f"problem: {problem}")
