"""`python -m checkpoint_engine` and the command `checkpoint-engine`."""

from __future__ import annotations

import sys


def main() -> None:
    from checkpoint_engine.cli import run

    arguments = sys.argv[1:]
    if arguments and arguments[0].partition("=")[0] == "--uds":  # the contract's `python -m checkpoint_engine --uds PATH`
        arguments = ["serve", *arguments]
    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
