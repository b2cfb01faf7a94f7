"""``python -m autoseg`` is the command ``autoseg``."""

import sys

from autoseg.cli import main

sys.exit(main())
