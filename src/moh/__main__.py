"""`python -m moh`, the same as the command `moh`."""

import sys

from moh.cli import main

sys.exit(main())
