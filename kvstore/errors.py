"""Errors of the store and the transfer plane.

KvError
├── NoRoom           the pool cannot give that many blocks now; nothing was taken
├── StaleBlock       a block reference whose generation has passed (design invariant I2)
└── TransferError    a transfer cannot go on
    ├── LinkClosed   the link is closed; nothing more lands through it
    └── Unavailable  the transport is not usable on this machine; the message says what is missing
"""

from __future__ import annotations


class KvError(Exception):
    """Base of all errors raised by `kvstore`."""


class NoRoom(KvError):
    """The pool cannot give that many blocks now; nothing was taken."""


class StaleBlock(KvError):
    """A block reference whose generation has passed."""


class TransferError(KvError):
    """A transfer cannot go on."""


class LinkClosed(TransferError):
    """The link is closed; nothing more lands through it."""


class Unavailable(TransferError):
    """The transport is not usable on this machine; the message says what is missing and how to get it."""
