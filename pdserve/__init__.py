"""Workers: engine, models, kernels, worker roles, control protocol, command line. Imports `kvstore`, never `router`."""

from kvstore import __version__ as __version__
