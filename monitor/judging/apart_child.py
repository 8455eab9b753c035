"""The process in which the judges work: `python -m monitor.judging.apart_child STORE FD SETTINGS`. See `monitor.judging.apart`.

It reads the store and talks over the socket with the service, which started it and without which it ends.
"""

import contextlib
import gc
import os
import signal
import sys
import threading
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from monitor.judge import Settings
from monitor.judging.apart import (
    BEAT_S,
    NICE,
    SELDOM,
    Ask,
    Bands,
    Beat,
    Forget,
    Notice,
    Said,
    ToParent,
    Write,
    Written,
    pack,
    to_child,
)
from monitor.judging.loop import Judging
from monitor.store.ingest import Refused, Taken
from monitor.store.store import Store
from monitor.store.tables import Judged


def main(folder: str, fd: str, settings: str) -> int:
    """Judge until told to end, or until nobody is there to tell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which says End
    with contextlib.suppress(OSError):
        os.nice(NICE)
    gc.set_threshold(*SELDOM)
    line = Connection(int(fd))
    gate = threading.Lock()
    waiting: dict[int, Future[Taken]] = {}
    count = 0

    def send(message: ToParent) -> None:
        with gate:
            try:
                line.send_bytes(pack(message))
            except OSError:
                os._exit(0)  # the service is gone: what is not written is judged again by the next one

    def write(judged: list[Judged]) -> "Future[Taken]":
        nonlocal count
        count += 1
        done: Future[Taken] = Future()
        waiting[count] = done
        send(Write(count, judged))
        return done

    def changed(run_ids: list[int]) -> None:
        send(Said({run_id: judging.last[run_id] for run_id in run_ids if run_id in judging.last}))

    judging = Judging(
        Store(Path(folder), read_only=True), write, settings=msgspec.json.decode(settings, type=Settings),
        changed=changed,
    )  # fmt: skip
    send(Beat(judging.lag_s(), None))
    judging.start()
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            send(Beat(judging.lag_s(), judging.failing))

    threading.Thread(target=beat, daemon=True).start()
    while True:
        try:
            message = to_child(line.recv_bytes())
        except (OSError, EOFError):
            os._exit(0)
        if isinstance(message, Notice):
            judging.notice(message.ord)
        elif isinstance(message, Written):
            done = waiting.pop(message.number)
            if message.error is None:
                done.set_result(Taken(0, 0, 0))
            else:
                done.set_exception(Refused(503, "store", message.error))
        elif isinstance(message, Ask):
            found = [(attempt, flat.tobytes()) for attempt, flat in judging.pending_bands(message.run_id)]
            send(Bands(message.number, found))
        elif isinstance(message, Forget):
            judging.forget(message.run_ids)
        else:
            # the answers to its last writes come while it ends, so somebody must go on listening
            threading.Thread(target=_end, args=(judging, ended), daemon=True).start()


def _end(judging: Judging, ended: threading.Event) -> None:
    judging.stop()
    ended.set()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
