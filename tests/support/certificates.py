"""Certificates of a deployment, in a folder as `kvstore.control_plane` reads it."""

from __future__ import annotations

from pathlib import Path

import trustme

from kvstore.control_plane import PEER_NAME


def write_certificates(folder: Path, authority: trustme.CA, name: str = PEER_NAME) -> Path:
    """Of a new process, over those of the one before."""
    folder.mkdir(exist_ok=True)
    issued = authority.issue_cert(name)
    (folder / "tls.crt").write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
    (folder / "tls.key").write_bytes(issued.private_key_pem.bytes())
    (folder / "tls.key").chmod(0o600)
    authority.cert_pem.write_to_path(str(folder / "ca.crt"))
    return folder
