"""The compiled library: built if need be, loaded, and its functions bound with the types of their arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from pdserve.kernels.build import NativeUnavailable, build
from pdserve.launch.folders import cache_folder

Function = Callable[..., Any]
POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


def open_library() -> ctypes.CDLL:
    """
    Raises:
        NativeUnavailable: it cannot be built or loaded.
    """
    path = build(cache_folder())
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} cannot be loaded ({error})") from error


def bind(library: ctypes.CDLL, name: str, result: Any, arguments: tuple[Any, ...]) -> Function:
    """`name` is without the prefix that all of them have."""
    function = library[f"pds_{name}"]
    function.restype, function.argtypes = result, arguments
    return function
