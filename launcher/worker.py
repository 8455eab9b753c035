"""One rank under torchrun, without Ray: `torchrun --nproc-per-node 2 -m launcher.worker run.yaml`."""

import sys

from launcher.training.loop import main

if __name__ == "__main__":
    sys.exit(main())
