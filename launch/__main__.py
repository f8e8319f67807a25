"""`python -m launch` is `globallocal`."""

import sys

from launch.cli import main

sys.exit(main())
