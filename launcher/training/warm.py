"""The process that a rank's training is forked from: everything is imported, nothing is begun.

    python -m launcher.training.warm ANSWERS PULSE [aside]     two inherited file descriptors; orders come on stdin

Importing torch and DeepSpeed is most of what a restart would wait for. So each rank keeps one such process, which only
imports; every attempt trains in a child forked from it, and a failed attempt costs a fork. The child starts with no
process group, no CUDA context and no memory of another attempt: whatever state a half-dead collective left behind went
with the process it was in. It has one thread and has not touched a GPU when it forks, so forking is sound.

    order                                     answer
    -                                         {"ready": seconds}         once, when all is imported
    {"train": assignment, "environment": {}}  {"started": pid}, {"ended": {...}}, {"gone": pid}
    {"signal": number}                        -                          to the child; 9 to its own children too

A child that has finished stays until it is killed, a minute at most: other ranks may still need its end of a
connection. With `aside` the imports give way to whatever else wants the cores, which may be ranks that train. `ended` holds `outcome`, `wrong_input`, `raised` (type, message, trace) or, when the child said nothing, `died`
(signal, or the exit status it left with). When orders end, so does everything: a rank never outlives its owner.
"""

import contextlib
import ctypes
import gc
import json
import mmap
import os
import selectors
import signal
import struct
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import asdict
from typing import Any

PULSE = struct.Struct("qddq")
"""What a rank writes at every step: the step, when (seconds, CLOCK_MONOTONIC of its host), the 99th percentile of the
time between steps (seconds), and the phase."""
PHASES = ("start", "step", "validate", "checkpoint", "own")
"""`own`: a step was told of, and the user's own code goes on: to the next one, to an evaluation, to whatever it does."""
STEPPING = ("step", "own")
LINGER_S = 60.0
STOP_SIGNAL, SAVE_SIGNAL, STACKS_SIGNAL = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
"""Commit and end; commit and go on; print every thread's stack."""
ASIDE_NICE = 10
PR_SET_PDEATHSIG, PR_SET_PTRACER, PTRACER_ANY = 1, 0x59616D61, -1


def warm_up() -> None:
    """Import what training needs, without starting a thread or touching a GPU."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a look at the driver would spoil the fork
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # DeepSpeed asks torch.compile for things as it builds an engine, and that brings half of the imports
    with contextlib.suppress(ImportError):
        import torch._dynamo
        import torch._inductor.compile_fx
    with contextlib.suppress(ImportError):
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    import launcher.data.tokens
    import launcher.reporter
    import launcher.training.engine
    import launcher.training.loop
    import launcher.training.saving
    import launcher.workloads.gpt  # noqa: F401

    # what is imported stays: no collection has to walk through it at a step, nor write to the pages that children share
    gc.collect()
    gc.freeze()


def warm_up_aside() -> None:
    """The same in a thread of low priority, which ends: priority is a thread's own, and without privileges it never rises
    again. Raises what the imports raise."""
    failed: list[BaseException] = []

    def imports() -> None:
        try:
            me = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, me, min(19, os.getpriority(os.PRIO_PROCESS, me) + ASIDE_NICE))
            warm_up()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=imports)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


class Heart:
    """Writes the pulse: called by training at every step, and as validation or a checkpoint begins."""

    def __init__(self, pulse: mmap.mmap) -> None:
        self._pulse, self._last, self._p99 = pulse, None, 0.0
        self._intervals: deque[float] = deque(maxlen=256)
        self._beats, self._step = 0, -1

    def __call__(self, step: int, phase: str = "step") -> None:
        now = time.monotonic()
        if phase in STEPPING and step != self._step:
            if self._last is not None:
                self._intervals.append(now - self._last)
            self._beats += 1
            if self._beats <= 16 or self._beats % 16 == 0:
                ordered = sorted(self._intervals)
                self._p99 = ordered[int(0.99 * (len(ordered) - 1) + 0.5)] if ordered else 0.0
        self._step = step
        self._last = now if phase in STEPPING else None  # the step after a checkpoint is no step's length
        PULSE.pack_into(self._pulse, 0, step, now, self._p99, PHASES.index(phase))


def run_child(order: dict[str, Any], say: int, pulse: mmap.mmap) -> None:
    """In the child: train, and tell on the pipe `say` how it went."""
    import faulthandler

    from launcher.errors import WrongInput
    from launcher.storage.output import rank_output
    from launcher.training import loop as worker

    wishes = {STOP_SIGNAL: False, SAVE_SIGNAL: False}

    def wish(number: int, frame: Any) -> None:
        wishes[signal.Signals(number)] = True

    def save() -> bool:
        asked, wishes[SAVE_SIGNAL] = wishes[SAVE_SIGNAL], False
        return asked

    for number in wishes:
        signal.signal(number, wish)
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    os.environ.update(order["environment"])
    assignment = worker.Assignment(**order["train"])
    answer: dict[str, Any]
    try:
        with rank_output(assignment.folder, assignment.attempt, int(os.environ["RANK"])):
            outcome = worker.train(
                assignment,
                stop=lambda: wishes[STOP_SIGNAL],
                save=save,
                beat=Heart(pulse),
            )
        answer = {"outcome": asdict(outcome)}
    except WrongInput as error:
        answer = {"wrong_input": str(error)}
    except BaseException as error:
        lines = traceback.format_exception(error)
        answer = {
            "raised": {
                "type": type(error).__name__,
                "message": str(error)[:4000],
                "trace": "".join(lines)[-8000:],
                "superseded": getattr(error, "exit_status", None) == 75,
            }
        }
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[os.write(say, data) :]
    if "outcome" in answer:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        time.sleep(LINGER_S)


def with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Be sent a signal when the parent ends, and let py-spy look in, where the kernel knows how."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
        libc.prctl(PR_SET_PTRACER, ctypes.c_ulong(PTRACER_ANY), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


class Warm:
    """The loop: one child at a time."""

    def __init__(self, answers: int, pulse: int) -> None:
        self._answers, self._pulse = answers, mmap.mmap(pulse, PULSE.size)
        self._child, self._told, self._heard, self._answered = 0, -1, b"", False
        self._orders = b""

    def tell(self, **answer: Any) -> None:
        os.write(self._answers, json.dumps(answer).encode() + b"\n")

    def run(self) -> None:
        """Until the orders end."""
        wake, poke = os.pipe()
        for descriptor in (wake, poke):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(poke, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # Ray asks the whole family; the child is asked by order
        with selectors.DefaultSelector() as ready:
            self._ready = ready
            ready.register(0, selectors.EVENT_READ)
            ready.register(wake, selectors.EVENT_READ)
            while True:
                for key, _ in ready.select():
                    if key.fd == wake:
                        with contextlib.suppress(BlockingIOError):
                            os.read(wake, 4096)
                    elif key.fd == 0:
                        more = os.read(0, 1 << 16)
                        if not more:
                            self._signal(signal.SIGKILL)
                            return
                        self._orders += more
                    elif key.fd == self._told:
                        self._hear()
                *lines, self._orders = self._orders.split(b"\n")
                for line in lines:
                    self._obey(json.loads(line))
                self._reap()

    def _obey(self, order: dict[str, Any]) -> None:
        if "signal" in order:
            self._signal(order["signal"])
        else:
            if self._child:  # it lingers, or its owner has given it up
                self._signal(signal.SIGKILL)
                self._reap(os.waitpid(self._child, 0))
            self._fork(order)

    def _fork(self, order: dict[str, Any]) -> None:
        told, say = os.pipe()
        parent = os.getpid()
        PULSE.pack_into(self._pulse, 0, -1, time.monotonic(), 0.0, 0)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setpgid(0, 0)
                with_parent(parent)
                os.close(told)
                os.close(self._answers)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                run_child(order, say, self._pulse)
                status = 0
            finally:
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(Exception):
                        stream.flush()
                os._exit(status)  # whatever libraries would do at exit belongs to the parent
        os.close(say)
        with contextlib.suppress(OSError):
            os.setpgid(child, child)
        self._child, self._told, self._heard, self._answered = child, told, b"", False
        self._ready.register(told, selectors.EVENT_READ)
        self.tell(started=child)

    def _signal(self, number: int) -> None:
        if self._child:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if number == signal.SIGKILL:
                    os.killpg(self._child, number)
                else:
                    os.kill(self._child, number)

    def _hear(self) -> bool:
        """Read what the child says; False at its end."""
        more = os.read(self._told, 1 << 16)
        self._heard += more
        if not self._answered and self._heard.endswith(b"\n"):
            self._answered = True
            self.tell(ended=json.loads(self._heard))
        if not more:
            self._ready.unregister(self._told)
            os.close(self._told)
            self._told = -1
        return bool(more)

    def _reap(self, gone: tuple[int, int] | None = None) -> None:
        """Say so when the child has ended."""
        if not self._child:
            return
        pid, status = gone or os.waitpid(self._child, os.WNOHANG)
        if pid == 0:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what it started and left behind
        while self._told >= 0 and self._hear():
            pass
        self._child = 0
        if not self._answered:
            code = os.waitstatus_to_exitcode(status)
            died = {"signal": -code if code < 0 else None, "status": code if code >= 0 else None}
            self.tell(ended={"died": died})
        self.tell(gone=pid)


def main(argv: list[str]) -> None:
    began = time.monotonic()
    answers, pulse = (int(a) for a in argv[:2])
    if argv[2:] == ["aside"]:
        warm_up_aside()
    else:
        warm_up()
    warm = Warm(answers, pulse)
    warm.tell(ready=round(time.monotonic() - began, 3))
    warm.run()


if __name__ == "__main__":
    main(sys.argv[1:])
