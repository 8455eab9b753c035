"""Trains several runs one after another in one set of processes, which torchrun starts: importing torch costs more than
these runs do. All of them must have the same pp and tp, since DeepSpeed lays out its groups once a process.

    torchrun --nproc-per-node 2 many_layouts.py RUN.yaml[@STOP] ...

A run with @STOP is stopped after so many steps, and trained again to its end. Every attempt is asked for a checkpoint as the
ranks of a host that has to go are: the first just before its third step, the others while that is made.
"""

import os
import sys

from launcher.training.ending import end_with


def main() -> int:
    from launcher.runspec.file import read_spec
    from launcher.training.loop import train
    from launcher.training.saving import release_held, shared_assignment

    for run in sys.argv[1:]:
        path, _, at = run.partition("@")
        spec = read_spec(path)
        looks = 0

        def stop(limit: int = int(at or 0)) -> bool:
            nonlocal looks
            looks += 1
            return looks == limit

        for _ in range(2 if at else 1):
            asked = iter([0, 0, 1] if os.environ["RANK"] == "0" else [0, 0, 0, 1])
            train(shared_assignment(spec), stop=stop, save=lambda asked=asked: bool(next(asked, 0)))
            release_held()
    return 0


if __name__ == "__main__":
    end_with(main)
