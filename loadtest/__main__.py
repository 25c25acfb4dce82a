"""`python -m loadtest sweep ...` and `overload ...`."""

from __future__ import annotations

import sys

from loadtest import overload, sweep


def main() -> None:
    match sys.argv[1:2]:
        case ["sweep"]:
            sweep.main(sys.argv[2:])
        case ["overload"]:
            overload.main(sys.argv[2:])
        case _:
            raise SystemExit(
                "usage: python -m loadtest sweep|overload [--help]\n       locust -f loadtest/locustfile.py"
            )


if __name__ == "__main__":
    main()
