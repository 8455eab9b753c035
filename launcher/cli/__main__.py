"""`python -m launcher.cli` is the `losscast` command."""

import sys
from pathlib import Path

# Python put the working directory first, where a module named monitor would be imported in place of ours
sys.path[0] = str(Path(__file__).resolve().parents[2])

from launcher.cli import main  # noqa: E402

sys.exit(main())
