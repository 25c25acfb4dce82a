"""Reading the weight files of a model folder; every way they can be wrong becomes one sentence."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdserve.errors import ConfigError
from pdserve.kernels.quantised import Bits
from pdserve.models.quantise import Levels

_SUPPORTED_DTYPES = ("BF16", "F16", "F32")


class Tensors(Protocol):
    """What a checkpoint gives, whatever its files are; see the methods of `Checkpoint`."""

    def check(self, name: str, shape: tuple[int, ...]) -> None: ...

    def read(self, name: str) -> Tensor: ...

    def bits(self, name: str) -> Bits | None: ...

    def levels(self, name: str) -> Levels: ...


def open_checkpoint(files: tuple[Path, ...]) -> AbstractContextManager[Tensors]:
    """The files of `pdserve.models.folder.weight_files`.

    Raises:
        ConfigError: here or on entering, a file is missing, truncated or corrupt.
    """
    if files[0].suffix != ".gguf":
        return Checkpoint(files)
    from pdserve.models.gguf_file import GgufFile  # gguf is imported where it is read

    return GgufFile(files[0])


class Checkpoint:
    """The tensors of one or several safetensors files, read one at a time. Use as a context manager.

    Raises:
        ConfigError: on entering, a file is missing, truncated or corrupt.
    """

    def __init__(self, files: tuple[Path, ...]) -> None:
        self._paths = files
        self._files: dict[str, tuple[Path, Any]] = {}  # by tensor name
        self._stack = ExitStack()

    def __enter__(self) -> Checkpoint:
        with ExitStack() as stack:
            for path in self._paths:
                try:
                    file = stack.enter_context(safe_open(path, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise ConfigError(f"{path} is truncated or not a safetensors file: {error}.") from error
                self._files.update(dict.fromkeys(file.keys(), (path, file)))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Look at the header only.

        Raises:
            ConfigError: there is no such tensor, or it has another shape or an unsupported dtype.
        """
        path, file = self._find(name)
        entry = file.get_slice(name)
        if tuple(entry.get_shape()) != shape:
            raise ConfigError(f"{path}: {name} has shape {entry.get_shape()}, the config makes it {list(shape)}.")
        if entry.get_dtype() not in _SUPPORTED_DTYPES:
            raise ConfigError(
                f"{path}: {name} is stored as {entry.get_dtype()}; supported: {', '.join(_SUPPORTED_DTYPES)}."
            )

    def read(self, name: str) -> Tensor:
        """The tensor as stored.

        Raises:
            ConfigError: it is missing or cannot be read.
        """
        path, file = self._find(name)
        try:
            tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: {name} cannot be read: {error}.") from error
        return tensor

    def bits(self, name: str) -> Bits | None:
        """What a tensor is quantised to; None: dense, as all of these are."""
        return None

    def levels(self, name: str) -> Levels:
        """A tensor of which `bits` are not None."""
        raise AssertionError(f"{name} is dense")

    def _find(self, name: str) -> tuple[Path, Any]:
        found = self._files.get(name)
        if found is None:
            where = self._paths[0] if len(self._paths) == 1 else self._paths[0].parent
            raise ConfigError(f"{where} lacks the tensor {name}, which the config asks for.")
        return found
