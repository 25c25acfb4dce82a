"""Compiles the C kernels of pdserve/csrc once per machine, into the cache.

The file's name is a hash of everything that its bytes depend on: sources, flags, compiler, and the CPU that
`-march=native` means. Two processes that build at once write the same bytes and rename them into place: harmless.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "csrc"
COMPILERS = ("g++", "c++")
# Of -ffast-math only what the sources rely on: as a whole it would also assume that no infinity occurs and, when linked
# into a shared library, make the whole process flush denormals.
FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-fvisibility=hidden", "-w"),
)
X86_FLAGS = ("-mprefer-vector-width=512",)  # gcc prefers 256 bits for loops, from the days when 512 cost clock speed
TIMEOUT_S = 120


class NativeUnavailable(Exception):
    """There are no native kernels on this machine; the message is one sentence that says why."""


def build(cache: Path) -> Path:
    """The shared library, compiled if this machine's is not in `cache` yet (about three seconds).

    Raises:
        NativeUnavailable: no compiler, it failed, or the cache cannot be written.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NativeUnavailable("no C++ compiler is installed (Debian: apt-get install g++)")
    flags = FLAGS + (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())
    folder = cache / "kernels"
    library = folder / f"{_key(compiler, flags)}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            partial = Path(temporary) / library.name
            _run(compiler, *flags, str(SOURCES / "kernels.cpp"), "-o", str(partial))
            os.replace(partial, library)
    except OSError as error:
        raise NativeUnavailable(f"the cache {folder} cannot be written ({error.strerror})") from error
    return library


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    parts = [_run(compiler, "--version").encode(), _cpu_features().encode(), *(flag.encode() for flag in flags)]
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            parts += [source.name.encode(), source.read_bytes()]
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _cpu_features() -> str:
    """Changes whenever `-march=native` might: a cache folder may be shared by machines, or outlive one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # The first CPU's; `Features` is what arm64 says.
    of_cpu = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {of_cpu}"


def _run(compiler: str, *arguments: str) -> str:
    """Standard output of the compiler."""
    try:
        done = subprocess.run(
            (compiler, *arguments), capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, "LC_ALL": "C"}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"the compiler {compiler} cannot be run ({error})") from error
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        raise NativeUnavailable(f"the compiler {compiler} failed: {first.strip()}")
    return done.stdout
