"""The few operations beside torch's that a model needs, as a seam with several implementations (see `base`)."""

from __future__ import annotations

import logging

import torch

from pdserve.errors import ConfigError
from pdserve.kernel_limits import native_refusal
from pdserve.kernels.base import Kernels
from pdserve.kernels.build import NativeUnavailable
from pdserve.kernels.reference import ReferenceKernels

NAMES = ("auto", "native", "flashinfer", "sdpa", "reference")
_CPU = torch.device("cpu")

log = logging.getLogger(__name__)


def choose(
    name: str,
    head_dim: int = 64,
    group: int = 1,
    device: torch.device = _CPU,
    dtype: torch.dtype = torch.bfloat16,
) -> Kernels:
    """The implementation of that name; `auto` is the fastest that the device has. One log line.

    On the CPU native where it can be built, else reference; on CUDA flashinfer where it is installed, else sdpa.

    Args:
        head_dim: of the model.
        group: query heads of one kv head.

    Raises:
        ConfigError: no such name, or what was asked for is not possible here.
    """
    if name not in NAMES:
        raise ConfigError(f"Kernels must be one of {', '.join(NAMES)}, not {name!r}.")
    if name == "reference":
        log.info("kernels: reference, as configured")
        return ReferenceKernels()
    if device.type == "cuda":
        return _choose_cuda(name, device, head_dim, dtype)
    if name in ("flashinfer", "sdpa"):
        raise ConfigError(f"The {name} kernels run on CUDA; on the CPU there are native and reference.")
    from pdserve.kernels import native

    try:
        refusal = native_refusal(head_dim, group)
        if refusal is not None:
            raise NativeUnavailable(refusal)
        kernels = native.load()
    except NativeUnavailable as error:
        if name == "native":
            raise ConfigError(f"The native kernels are not available: {error}.") from error
        log.warning("kernels: reference, several times slower than native, because %s", error)
        return ReferenceKernels()
    log.info("kernels: native with %s", kernels.features)
    return kernels


def _choose_cuda(name: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> Kernels:
    from pdserve.kernels import flashinfer, sdpa

    if name == "native":
        raise ConfigError("The native kernels run on the CPU; on CUDA there are flashinfer, sdpa and reference.")
    if name != "sdpa":
        try:
            kernels = flashinfer.load(device, head_dim, dtype)
        except flashinfer.FlashInferUnavailable as error:
            if name == "flashinfer":
                raise ConfigError(f"The flashinfer kernels are not available: {error}.") from error
            log.warning("kernels: sdpa, several times slower than flashinfer, because %s", error)
        else:
            log.info("kernels: flashinfer")
            return kernels
    return sdpa.SdpaKernels()
