"""`python -m pdserve.bench.gpu [PART ...]`: correctness, then speed; each part is an entry of one JSON file.

Parts run one after the other and are written as they end, so a call may name as many as its time allows: each takes
less than 10 minutes, and a file that is there keeps the parts of the calls before.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch

from pdserve.bench.gpu import correctness, goodput, speed
from pdserve.bench.gpu.drive import Setup, give_back
from pdserve.bench.gpu.shapes import SHAPES
from pdserve.devices import resolve_device
from pdserve.errors import ConfigError
from pdserve.worker.config import TransportName

_DRIVER = Path("/proc/driver/nvidia/version")
_PACKAGES = (
    *("flashinfer-python", "apache-tvm-ffi", "triton", "numpy", "transformers"),
    *("ucxx-cu12", "ucxx-cu13", "libucx-cu12", "libucx-cu13", "nixl-cu12", "nixl-cu13"),
)

PARTS: dict[str, Callable[[Setup], dict[str, object]]] = {
    "kernels": correctness.kernels,
    "sampler": correctness.sampler,
    "checksum": correctness.checksum,
    "text": correctness.text,
    "text-default": correctness.text_default,
    "disaggregated": correctness.disaggregated,
    "floors": speed.floors,
    "layout": speed.layout,
    "backends": speed.backends,
    "decode": speed.decode,
    "prefill": speed.prefill,
    "tier": speed.tier,
    "push": speed.push,
    "transformers": speed.transformers,
    "goodput": goodput.goodput,
    "goodput-long": goodput.goodput_long,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--device", default="cuda", help="cpu runs the parts' own code, for tests")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--kv-bytes", type=int, help="of each pool; default: what the device has")
    parser.add_argument(
        "--transport", choices=get_args(TransportName), default="ucx", help="of goodput's workers; push tries each"
    )
    parser.add_argument("--json", type=Path, default=Path("bench-results/gpu.json"))
    args = parser.parse_args()
    unknown = sorted(set(args.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part is named {', '.join(unknown)}; there are {', '.join(PARTS)}")
    try:
        device = resolve_device(args.device)
    except ConfigError as error:
        sys.exit(f"gpu-check needs a GPU: {error}")
    with tempfile.TemporaryDirectory() as scratch:
        setup = Setup(device, args.shape, Path(scratch), args.kv_bytes, args.transport)
        if not run(setup, args.parts or list(PARTS), args.json):
            sys.exit(1)


def run(setup: Setup, parts: list[str], path: Path) -> bool:
    """Whether all was right; a part that fails does not keep the next ones from running."""
    result = json.loads(path.read_text()) if path.exists() else {}
    result["setting"] = _setting(setup)
    right = True
    for name in parts:
        began_s = time.monotonic()
        try:
            found: dict[str, object] = PARTS[name](setup)
        except Exception as error:
            traceback.print_exc()
            found, right = {"error": f"{type(error).__name__}: {error}"}, False
        give_back(setup.device)
        result[name] = {**found, "took_s": round(time.monotonic() - began_s, 1)}
        print(json.dumps({name: result[name]}), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    return right


def _setting(setup: Setup) -> dict[str, object]:
    cuda = setup.device.type == "cuda"
    properties = torch.cuda.get_device_properties(setup.device) if cuda else None
    return {
        "device": properties.name if properties is not None else platform.processor() or platform.machine(),
        "memory_bytes": properties.total_memory if properties is not None else None,
        "capability": list(torch.cuda.get_device_capability(setup.device)) if cuda else None,
        "driver": _DRIVER.read_text().partition("\n")[0] if _DRIVER.exists() else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": _versions(),
        "shape": setup.shape,
        "kv_bytes": setup.kv_bytes,
        "transport": setup.transport,
    }


def _versions() -> dict[str, str]:
    """Of what is installed of `_PACKAGES`."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


if __name__ == "__main__":
    main()
