"""Every kind of transport that moves bytes between processes, by name, for the suites that hold for all of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kvstore.errors import Unavailable
from kvstore.transfer.nixl import NixlTransport
from kvstore.transfer.transport import Buffer, Transport
from kvstore.transfer.ucx import UcxTransport

NIXL = Path(__file__).parents[2] / ".tools/nixl"  # `make nixl`
# NIXL brings a UCX of its own, and two of them in one process do not get along: its kinds have a run to themselves.
OWN_RUN = os.environ.get("TRANSPORT") == "nixl"
KINDS = ("nixl", "nixl inline") if OWN_RUN else ("ucx", "ucx remote")


def same_host(kind: str) -> bool:
    return not kind.endswith("remote")


def reads(kind: str) -> bool:
    """Whether it is the receiver that moves large messages."""
    return kind == "nixl"


def make_transport(kind: str, memory: Buffer) -> Transport:
    """
    Args:
        memory: of which most messages are parts.
    """
    if kind.startswith("nixl"):
        return _nixl(kind, memory)
    return UcxTransport()


def _nixl(kind: str, memory: Buffer) -> Transport:
    """Skips the test where it is not installed, but not in CI."""
    if NIXL.exists() and str(NIXL) not in sys.path:
        sys.path.append(str(NIXL))
    try:
        made = NixlTransport(() if "inline" in kind else (memory,))
    except Unavailable as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
    return made
