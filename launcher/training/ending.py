"""How a process that trained ends: after its own last exit handler, and before its Python is torn down.

Libraries leave threads behind (process groups, stores, uploads), and tearing down a Python, or a process group, while
one still runs can abort the process: a rank that trained well would tell torchrun that it failed. What a rank owes to
others it has done by then: its last collective has returned, and the kernel delivers what it has sent.
"""

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end the process with the status that it returns or exits with; 1 where it raises, with a traceback.

    Call it before torch or ray are imported: exit handlers run in reverse, and the one that ends the process must be
    the last. Threads that are no daemons are waited for.
    """
    status = 1

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(end)
    try:
        status = main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    sys.exit(status)
