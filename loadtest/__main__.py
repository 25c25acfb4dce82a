"""`python -m loadtest sweep ...`."""

from __future__ import annotations

import sys

from loadtest import sweep


def main() -> None:
    if sys.argv[1:2] != ["sweep"]:
        raise SystemExit("usage: python -m loadtest sweep [--help]\n       locust -f loadtest/locustfile.py")
    sweep.main(sys.argv[2:])


if __name__ == "__main__":
    main()
