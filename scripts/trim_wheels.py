"""`python trim_wheels.py FOLDER WHEEL...`: unpacks wheels without what a worker never reads at run time."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

DATA = "flashinfer/data/"
# Headers, and the sources of the kernels that we call.
HEADERS = ("include/", "cutlass/include/", "cutlass/tools/util/include/", "spdlog/include/")
HEADERS += ("cccl/cub/cub/", "cccl/libcudacxx/include/", "cccl/thrust/thrust/")
SOURCES = re.compile(
    r"csrc/(batch_|single_|page|norm|rope|sampling|renorm|cascade|flashinfer_|rmsnorm|tvm_ffi_utils|runtime_utils|logging)"
    r"[^/]*$"
)
UNUSED = re.compile(
    r"(^flashinfer/(moe_ep|experimental/(?!__init__|cake_nvfp4_per_token))"
    r"|^tvm_ffi/(src|testing|cython)/|\.a$|\.la$|/cmake/|/pkgconfig/|perftest|/share/|/examples/|/tests?/|\.libs/)"
)
# Of NIXL all but the UCX plugin, and the libraries of clouds and of remote direct memory access that the others want.
OF_NIXL = re.compile(
    r"(^nixl_ep|\.scripts/|/libplugin_(?!UCX\.)|perftest|/lib(aws|azure|s2n|gusli|xml2|ibverbs|mlx5|nl-|uct_ib|uct_rdma))"
)
OF_UCX = re.compile(r"(/include/|\.pxd$|\.pyx$|\.so\.0\.0\.0$)")  # what only those who compile against it want


def wanted(name: str, wheel: str) -> bool:
    if name.startswith(DATA):
        inside = name.removeprefix(DATA)
        return inside.startswith(HEADERS) or bool(SOURCES.match(inside))
    if wheel.startswith("nixl"):
        return not OF_NIXL.search(name)
    if re.match(r"(lib)?(ucx|rmm)", wheel):
        return not UNUSED.search(name) and not OF_UCX.search(name)
    if wheel.startswith(("flashinfer", "apache_tvm_ffi")):
        return not UNUSED.search(name)
    return True


def _extract(archive: zipfile.ZipFile, name: str, folder: Path) -> None:
    """With its mode, which `zipfile` leaves out: a wheel may hold a program."""
    path = Path(archive.extract(name, folder))
    mode = archive.getinfo(name).external_attr >> 16
    if mode and path.is_file():
        path.chmod(mode & 0o777)


def main(folder: str, *wheels: str) -> None:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if wanted(name, Path(wheel).name)]
            # libX.so and libX.so.0 are the same bytes.
            copies = {name for name in names if name.endswith(".so") and f"{name}.0" in names}
            for name in names:
                if name not in copies:
                    _extract(archive, name, Path(folder))
            for name in copies:
                (Path(folder) / name).symlink_to(Path(name).name + ".0")


if __name__ == "__main__":
    main(*sys.argv[1:])
