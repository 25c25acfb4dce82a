"""`python unpack_wheels.py FOLDER WHEEL...`: FlashInfer's and NIXL's Python parts, without what no test reads.

That is hundreds of MB: CUDA sources; an expert-parallel library and command line tools.
"""

from __future__ import annotations

import sys
import zipfile

LEFT_OUT = ("flashinfer/data/", "nixl_ep", "nixl_cu12.scripts/")


def main(folder: str, *wheels: str) -> None:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if not name.startswith(LEFT_OUT)])


if __name__ == "__main__":
    main(*sys.argv[1:])
