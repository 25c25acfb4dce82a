"""`python unpack_flashinfer.py FOLDER WHEEL...`: FlashInfer's Python part, without its 450 MB of CUDA sources."""

from __future__ import annotations

import sys
import zipfile


def main(folder: str, *wheels: str) -> None:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if not name.startswith("flashinfer/data/")])


if __name__ == "__main__":
    main(*sys.argv[1:])
