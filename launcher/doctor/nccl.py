"""An all-reduce between the GPUs of this machine: python -m launcher.doctor.nccl

One process a GPU, eight at most, over NCCL; 64 MiB, the sum checked. One line on stdout, beginning with `skipped` where
there is nothing to try; exit 1 with the reason on stderr.
"""

import os
import sys
import time
from typing import Any

from launcher.ports import free_port

MOST = 8
ELEMENTS = 16 << 20
ROUNDS = 5


def one(rank: int, world: int, port: int, said: Any) -> None:
    """Rank `rank` of the group; rank 0 puts (sum of one element, seconds a round) in `said`."""
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    ones = torch.ones(ELEMENTS, device="cuda")
    dist.all_reduce(ones)
    value = float(ones[-1])
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(ones)
    torch.cuda.synchronize()
    if rank == 0:
        said.put((value, (time.perf_counter() - began) / ROUNDS))
    dist.destroy_process_group()


def main() -> int:
    import torch
    import torch.multiprocessing as mp

    if not torch.cuda.is_available():
        print("skipped: this torch sees no GPU" + ("" if torch.version.cuda else " (it is a CPU build)"))
        return 0
    world = min(MOST, torch.cuda.device_count())
    port = free_port()
    if world == 1:  # no second process to start: the collective runs all the same
        import queue

        said: Any = queue.Queue()
        one(0, 1, port, said)
    else:
        said = mp.get_context("spawn").SimpleQueue()
        mp.spawn(one, args=(world, port, said), nprocs=world)  # type: ignore[no-untyped-call]
    value, seconds = said.get()
    if value != world:
        print(f"the sum of {world} ones came out as {value}", file=sys.stderr)
        return 1
    moved = 2 * (world - 1) / world * ELEMENTS * 4 / seconds / 1e9
    speed = f", {moved:.0f} GB/s on the bus" if world > 1 else " (alone: no link was tried)"
    print(f"{world} GPU{'s' if world > 1 else ''} over NCCL, 64 MiB in {1000 * seconds:.2f} ms{speed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
