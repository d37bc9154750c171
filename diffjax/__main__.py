"""`python -m diffjax`, the same as the command `diffjax`."""

import sys

from diffjax.cli import main

sys.exit(main())
