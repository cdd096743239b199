"""``python -m convexbn``."""

import sys

from convexbn.cli import main

sys.exit(main())
