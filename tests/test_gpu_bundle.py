"""What is left out of the wheels of the offline bundle, and that the rest arrives as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "trim_wheels.py"


def wheel(path: Path, files: dict[str, int]) -> Path:
    """With these modes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, mode in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, name)
    return path


def unpacked(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_a_program_can_be_run_and_copies_are_links(tmp_path: Path) -> None:
    files = {"server/bin/serve": 0o755, "server/__init__.py": 0o644, "server/of_old_zip.py": 0}
    files |= {"libucx/lib/libucp.so": 0o755, "libucx/lib/libucp.so.0": 0o755}
    made = wheel(tmp_path / "server-1-py3-none-any.whl", files)
    site = tmp_path / "site"
    subprocess.run([sys.executable, SCRIPT, site, made], check=True)
    assert unpacked(site) == set(files)
    assert os.access(site / "server/bin/serve", os.X_OK)
    assert not (site / "server/__init__.py").stat().st_mode & 0o111
    assert (site / "libucx/lib/libucp.so").readlink() == Path("libucp.so.0")


def test_of_flashinfer_goes_what_compiles_our_kernels(tmp_path: Path) -> None:
    kept = {"flashinfer/decode.py", "flashinfer/data/include/flashinfer/page.cuh", "flashinfer/data/csrc/page.cu"}
    kept |= {"flashinfer/data/csrc/batch_prefill_sm90.cu", "flashinfer/data/cutlass/include/cute/layout.hpp"}
    dropped = {"flashinfer/data/csrc/trtllm_gen.cu", "flashinfer/data/cutlass/examples/a.cu", "flashinfer/moe_ep/a.py"}
    made = wheel(tmp_path / "flashinfer_python-1-py3-none-any.whl", dict.fromkeys(kept | dropped, 0o644))
    site = tmp_path / "site"
    subprocess.run([sys.executable, SCRIPT, site, made], check=True)
    assert unpacked(site) == kept
