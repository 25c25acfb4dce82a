"""What serving needs of this machine, each looked at for real: the lines of `pdserve doctor`."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pdserve.errors import ConfigError
from pdserve.launch.folders import cache_folder
from pdserve.launch.http_front import check_port_free
from pdserve.launch.redis_server import server_binary

PROBE_TIMEOUT_S = 120.0
MIN_MEMORY_BYTES = 2 << 30
MIN_SHM_BYTES = 64 << 20
COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `remedy` says how to get what is missing; without what is `needed` nothing can be served."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = True


def run_checks(port: int) -> list[Check]:
    """All checks, in the order to be shown. Those that start processes run at the same time."""
    jobs: list[Callable[[], Check]] = [
        check_python,
        check_torch,
        check_ucx,
        check_rdma,
        check_redis,
        check_compiler,
        check_kernels,
        check_model,
        check_memory,
        check_shared_memory,
        lambda: check_port(port),
    ]
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: job(), jobs))


def can_serve(checks: Sequence[Check]) -> bool:
    return all(check.ok or not check.needed for check in checks)


def check_python() -> Check:
    ok = sys.version_info >= (3, 11)
    return Check("python", ok, platform.python_version(), "install Python 3.11 or newer")


def check_torch() -> Check:
    return _probed("torch", "pip install torch==2.13.0")


def check_ucx() -> Check:
    return _probed("ucx", "pip install 'ucxx-cu12==0.52.*' (CUDA 13 hosts: ucxx-cu13)")


def check_rdma() -> Check:
    """The wheels of UCX are built without verbs; a network of 5 GB/s needs nothing more, RDMA a system UCX."""
    package = importlib.util.find_spec("libucx")
    places = list(package.submodule_search_locations or ()) if package is not None else []
    verbs = [module for place in places for module in Path(place).glob("lib/ucx/libuct_ib*.so*")]
    if verbs:
        return Check("rdma", True, "UCX has its verbs transports", needed=False)
    remedy = "optional: install a system UCX with verbs and put its folder first in LD_LIBRARY_PATH"
    return Check("rdma", False, "the UCX of the wheels is built without verbs", remedy, needed=False)


def check_redis() -> Check:
    try:
        return Check("redis", True, str(server_binary()))
    except ConfigError as error:
        return Check("redis", False, "no server", str(error))


def check_compiler() -> Check:
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    remedy = "apt-get install g++ (without it attention runs on the slow reference kernels)"
    return Check("compiler", found is not None, found or "no C++ compiler", remedy, needed=False)


def check_kernels() -> Check:
    """Builds them where that has not been done."""
    check = _probed("kernels", "see the compiler above")
    native = check.ok and check.detail.startswith("native")
    return Check("kernels", native, check.detail, "see the compiler above", needed=not check.ok)


def check_model() -> Check:
    from pdserve.models.default_model import NAME, is_whole

    folder = cache_folder() / "models" / NAME
    if is_whole(folder):
        return Check("model", True, f"{folder}, whole", needed=False)
    state = "damaged" if folder.exists() else "not there yet"
    return Check("model", False, f"{folder} is {state}", "`pdserve up` fetches it (93 MB)", needed=False)


def check_memory() -> Check:
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    detail = f"{available / (1 << 30):.1f} GiB free"
    return Check("memory", available >= MIN_MEMORY_BYTES, detail, f"free {MIN_MEMORY_BYTES >> 30} GiB")


def check_shared_memory() -> Check:
    """UCX moves blocks between processes of a machine through it; without it they go by TCP."""
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return Check("/dev/shm", False, "not there", "mount a tmpfs on /dev/shm", needed=False)
    free = stat.f_bavail * stat.f_frsize
    remedy = "make it larger (docker: --shm-size=1g), or blocks move by TCP"
    return Check("/dev/shm", free >= MIN_SHM_BYTES, f"{free / (1 << 20):.0f} MiB free", remedy, needed=False)


def check_port(port: int) -> Check:
    try:
        check_port_free("127.0.0.1", port)
    except ConfigError as error:
        return Check(f"port {port}", False, "taken", str(error), needed=False)
    return Check(f"port {port}", True, "free")


def _probed(name: str, remedy: str) -> Check:
    """A check by `pdserve.launch.probe` in a process of its own."""
    arguments = [sys.executable, "-m", "pdserve.launch.probe", name]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
        result = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return Check(name, False, f"gave no answer in {PROBE_TIMEOUT_S:.0f} s", remedy)
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return Check(name, False, f"the probe ended with code {done.returncode}: {last}", remedy)
    if "problem" in result:
        return Check(name, False, str(result["problem"]), remedy)
    return Check(name, True, " · ".join(result["facts"]))
