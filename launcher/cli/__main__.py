"""`python -m launcher.cli` is the `losscast` command."""

import sys

from launcher.cli import main

sys.exit(main())
