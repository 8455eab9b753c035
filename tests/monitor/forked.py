"""Starts `losscast monitor serve` over and over in a fraction of a second: everything is imported once, each service is a fork.

    python forked.py ARGUMENTS...     then "start" on stdin, each answered with a pid

The service is the real one in a process of its own, which can be killed at any moment; only the imports are shared.
"""

import os
import signal
import sys

import monitor.service.serving  # noqa: F401 - what takes the time
from launcher.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are not waited for
    for line in sys.stdin:
        if line.strip() != "start":
            break
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(0)
            os.dup2(2, 1)
            os._exit(main(sys.argv[1:]))
        print(pid, flush=True)
