"""One rank under torchrun, without Ray: `torchrun --nproc-per-node 2 -m launcher.worker run.yaml`."""

import atexit
import os
import sys

_status = [1]


def _end() -> None:
    """The last of what runs at exit: every thread was waited for and every other handler has run. What a Python tears down
    after that may abort it where libraries have threads left, and a rank that trained well would end like one that failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status[0])


if __name__ == "__main__":
    atexit.register(_end)  # before any library registers its own: handlers run in reverse

    from launcher.training.loop import main

    try:
        _status[0] = main()
    except SystemExit as ended:
        _status[0] = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    sys.exit(_status[0])
