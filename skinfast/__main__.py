"""``python -m skinfast``."""

import sys

from skinfast.cli import main

sys.exit(main())
