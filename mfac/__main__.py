"""Run the `mfac` command as `python -m mfac`."""

import sys

from mfac.cli.main import main

sys.exit(main())
