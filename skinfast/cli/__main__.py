"""``python -m skinfast.cli``."""

import sys

from skinfast.cli import main

sys.exit(main())
