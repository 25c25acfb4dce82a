"""Workers: engine, models, kernels, worker roles, control protocol, command line. Imports `kvstore`, never `router`."""

__version__ = "0.1.0"
