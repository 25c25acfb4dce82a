"""What all workers of a machine share, made once before they start: model folder, packed weights, compiled kernels.

`python -m pdserve.launch.prepare` is a process of its own, so that the supervisor never holds torch. Its ready line
says `model` (the folder) and `kernels` (which ones will run).
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from kvstore.layout import KvDtype
from pdserve.errors import ConfigError
from pdserve.launch.announce import Announcer, Progress
from pdserve.launch.folders import cache_folder
from pdserve.models.weight_format import LOAD_FORMATS, WEIGHT_FORMATS, LoadFormat, WeightFormat


def prepare(
    folder: Path | None,
    dtype: KvDtype,
    weights: WeightFormat,
    load_format: LoadFormat,
    kernels: str,
    progress: Progress,
) -> dict[str, str]:
    """
    Args:
        folder: the model, in any form that `pdserve.models.source` knows; None for the default one.

    Raises:
        ConfigError: the model or the kernels cannot be used.
    """
    from pdserve.models.default_model import ensure_default_model
    from pdserve.models.folder import check_folder
    from pdserve.models.source import resolve_model

    cache = cache_folder()
    if folder is None:
        folder = ensure_default_model(cache, progress)
    else:
        progress("looking for the model", None)
        folder = resolve_model(folder, cache)
    has_weights = load_format == "auto"
    check_folder(folder, weights=has_weights)
    progress("loading torch", None)
    from pdserve.kernels import choose
    from pdserve.models.config import load_config
    from pdserve.models.weights import open_weights

    config = load_config(folder)
    if has_weights:
        progress("packing the weights", None)
        open_weights(folder, config, dtype, cache, weights)
    progress("building the kernels", None)
    chosen = choose(kernels, config.head_dim, config.num_heads // config.num_kv_heads)
    return {"model": str(folder.resolve()), "kernels": chosen.name}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pdserve.launch.prepare", description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--weights", choices=WEIGHT_FORMATS, default="dense")
    parser.add_argument("--load-format", choices=LOAD_FORMATS, default="auto")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--ready-fd", type=int)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    announcer = Announcer(arguments.ready_fd)
    try:
        result = prepare(
            arguments.model,
            arguments.dtype,
            arguments.weights,
            arguments.load_format,
            arguments.kernels,
            announcer.progress,
        )
    except ConfigError as error:
        announcer.error(str(error))
        print(error, file=sys.stderr)
        return 1
    announcer.ready(**result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
