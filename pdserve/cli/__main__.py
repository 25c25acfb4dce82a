"""`python -m pdserve.cli` is `pdserve`."""

from pdserve.cli import main

main()
