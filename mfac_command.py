"""The entry point of the `mfac` command.

It is outside the package, because importing anything from that imports torch, which takes a second or two: an
interruption in that time is handled here, as `mfac.cli.main` handles a later one.
"""

import sys


def main() -> int:
    """Run the `mfac` command.

    Returns:
        The exit status; 130 if interrupted.
    """
    try:
        from mfac.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("mfac: interrupted\n")
        return 130
