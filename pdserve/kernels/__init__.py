"""The few operations beside torch's that a model needs, as a seam with several implementations (see `base`)."""

from __future__ import annotations

import logging

from pdserve.errors import ConfigError
from pdserve.kernel_limits import native_refusal
from pdserve.kernels.base import Kernels
from pdserve.kernels.build import NativeUnavailable
from pdserve.kernels.reference import ReferenceKernels

NAMES = ("auto", "native", "reference")

log = logging.getLogger(__name__)


def choose(name: str, head_dim: int = 64, group: int = 1) -> Kernels:
    """The implementation of that name; `auto` is native where it can be built, else reference. One log line.

    Args:
        head_dim: of the model.
        group: query heads of one kv head.

    Raises:
        ConfigError: no such name, or `native` was asked for and is not possible here.
    """
    if name not in NAMES:
        raise ConfigError(f"Kernels must be one of {', '.join(NAMES)}, not {name!r}.")
    if name == "reference":
        log.info("kernels: reference, as configured")
        return ReferenceKernels()
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
