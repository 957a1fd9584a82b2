"""`texforce` and `python -m texforce_cli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; the version is answered without importing anything."""
    if sys.argv[1:] == ["--version"]:
        from texforce_cli import __version__

        print(f"texforce {__version__}")
        return
    from texforce_cli.cli.app import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
