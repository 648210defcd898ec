"""`python -m checkpoint_engine` and the command `checkpoint-engine`."""

from __future__ import annotations

import sys


def main() -> None:
    from checkpoint_engine.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
