"""Run under `failing_writes.c`: a writer that is fed while the nth write of its store fails. One line of JSON for each n.

LD_PRELOAD=failing_writes.so python failing_writes.py FOLDER ERRNO COUNT FIRST LAST
"""

import ctypes
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from monitor.store.ingest import Ingest, Refused
from monitor.store.store import Store
from monitor.wire import parse
from tests.monitor.test_ingest import sample

BATCHES, EACH = 24, 10


def feed(folder: Path, shim: ctypes.CDLL, nth: int, count: int, code: int) -> dict[str, object]:
    """What was acknowledged and what was refused, of samples 0..; each batch is sent until it is taken, three times at most."""
    store = Store(folder)
    store.connection.execute("PRAGMA wal_autocheckpoint=6")  # so that a checkpoint is among what fails
    ingest = Ingest(store)
    ingest.start()
    shim.arm(nth, count, code)
    taken, refused = [], []
    for batch in range(BATCHES):
        body = b"".join(sample("a", 1, s, s + 1, 2.0 + s) for s in range(batch * EACH, (batch + 1) * EACH))
        for _ in range(3):
            try:
                ingest.submit(parse(body)).result(20)
                taken.append(batch)
                break
            except Refused as error:
                refused.append(error.status)
    calls = shim.calls()
    shim.arm(-1, 0, 0)
    after = b"".join(sample("b", 1, s, s + 1) for s in range(5))
    last = ingest.submit(parse(after)).result(20).accepted
    counted = ingest.runs["a"].samples if "a" in ingest.runs else 0
    ingest.stop()
    return {"nth": nth, "taken": taken, "refused": refused, "calls": calls, "after": last, "counted": counted}


def main() -> None:
    root, code, count, first, last = Path(sys.argv[1]), *map(int, sys.argv[2:6])
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    for nth in range(first, last):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                print(json.dumps(feed(root / str(nth), shim, nth, count, code)), flush=True)
                status = 0
            except BaseException as error:
                print(json.dumps({"nth": nth, "error": repr(error)}), flush=True)
            os._exit(status)  # as a kill would: nothing is closed
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
