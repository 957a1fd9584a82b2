"""`python -m texforce_hand OUT.task`: the models of the installed mediapipe 0.10.21 as a file for mediapipe 1.x."""

from __future__ import annotations

import sys
from pathlib import Path

from texforce_hand.models import find_models


def main(arguments: list[str]) -> int:
    """Write the file; the exit code."""
    if len(arguments) != 1 or not arguments[0].endswith(".task"):
        print("usage: python -m texforce_hand OUT.task", file=sys.stderr)
        return 2
    try:
        Path(arguments[0]).write_bytes(find_models().task())
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
