"""The Unix socket of a node: taken by one, and who is at its other end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from pathlib import Path

from kvstore.errors import Unavailable

_PEER = struct.Struct("3i")  # ucred: pid, uid, gid


def peer_pid(transport: asyncio.Transport) -> int:
    """Of the process at the other end; 0 if it is in a PID namespace that we cannot see."""
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as peer:
        pid, _, _ = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return int(pid)


def bind(path: Path) -> socket.socket:
    """Nobody can connect before the caller listens. Raises Unavailable."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)  # left by a node that was killed
        except FileNotFoundError:
            pass
        except OSError as error:
            raise Unavailable(f"{path} cannot be listened on: {error.strerror or error}") from error
        else:
            raise Unavailable(f"another store node listens on {path}")
    listening = socket.socket(socket.AF_UNIX)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        listening.bind(str(path))
        os.chmod(path, 0o600)
    except OSError as error:
        listening.close()
        raise Unavailable(f"{path} cannot be listened on: {error.strerror or error}") from error
    listening.setblocking(False)
    return listening
