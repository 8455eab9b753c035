"""Before the first step of an attempt: does every rank compute as fast as the others, and do they reach each other.

Each rank times a matrix product alone and an all-reduce with all; the results are gathered and rank 0 says them. A rank
whose product takes RATIO times the median's is named: it would hold up every step. Also the sum itself is checked, since
a network or a GPU that returns wrong numbers is better found here than in the loss. Tens of milliseconds.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

RATIO = 1.5
REPEATS = 5
REDUCE_BYTES = 4 << 20


def slow_ranks(seconds: Sequence[float], ratio: float = RATIO) -> dict[int, float]:
    """Ranks whose time is `ratio` times the others' median or more, with that multiple. Of one rank nobody is slow."""
    found = {}
    for rank, own in enumerate(seconds):
        others = [s for r, s in enumerate(seconds) if r != rank]
        if others and own >= ratio * statistics.median(others) > 0:
            found[rank] = own / statistics.median(others)
    return found


def report(matmul_s: Sequence[float], reduce_s: Sequence[float], wrong: Sequence[int]) -> list[str]:
    """What there is to say, for people. Times by rank, seconds; `wrong`: ranks whose sum was not the sum."""
    rate = REDUCE_BYTES / max(*reduce_s, 1e-9) / 1e6
    said = [
        f"preflight: matrix product {1e3 * statistics.median(matmul_s):.2f} ms, all-reduce of {REDUCE_BYTES >> 20} MiB over "
        f"{len(matmul_s)} ranks {1e3 * max(reduce_s):.1f} ms ({rate:.0f} MB/s)"
    ]
    said += [
        f"preflight: rank {r} is slow: {x:.1f} x the others' product" for r, x in slow_ranks(matmul_s).items()
    ]
    said += [f"preflight: rank {r} got a wrong sum from an all-reduce" for r in wrong]
    return said


def preflight(device: Any, say: Callable[[str], None]) -> None:
    """Run by every rank together once the group is joined; rank 0 says the result. Raises Failed where a sum is wrong."""
    import torch
    import torch.distributed as dist

    from launcher.errors import Failed

    rank, world = dist.get_rank(), dist.get_world_size()
    cuda = device.type == "cuda"
    size = 4096 if cuda else 256

    def timed(work: Callable[[], Any]) -> float:
        """The fastest of a few: what the machine can do, not what else it does."""
        best = float("inf")
        for _ in range(REPEATS):
            if cuda:
                torch.cuda.synchronize()
            began = time.monotonic()
            work()
            if cuda:
                torch.cuda.synchronize()
            best = min(best, time.monotonic() - began)
        return best

    a = torch.ones(size, size, device=device)
    product = timed(lambda: a @ a)
    data = torch.empty(REDUCE_BYTES // 4, device=device)

    def reduce() -> None:
        data.fill_(rank + 1)
        dist.all_reduce(data)

    reduced = timed(reduce)
    right = bool((data == world * (world + 1) / 2).all())
    mine = torch.tensor([product, reduced, float(right)], device=device)
    table = torch.empty(3 * world, device=device)
    dist.all_gather_into_tensor(table, mine)
    rows = table.view(world, 3).tolist()
    wrong = [r for r, row in enumerate(rows) if not row[2]]
    if rank == 0:
        for line in report([r[0] for r in rows], [r[1] for r in rows], wrong):
            say(line)
    if wrong:
        raise Failed(
            f"rank {wrong[0]} got a wrong sum from an all-reduce: its network or device can't be trusted"
        )
