"""Azure Blob through Azurite: our store beside the best plain use of the SDK, and what an upload costs a training step.

    python bench/blob.py [--rounds 5] [--only files | steps | here | ahead] [--json]

Files: 500 x 100 KB and 8 x 64 MiB, up and down, by turns in one run: ours (each file's sha256 known at the end), the SDK
alone (nothing hashed) as the fastest of a few ways to use it (threads over files, blocks in parallel inside a file), and the
SDK beside an equal promise: each file's sha256 with `hashlib.file_digest`, after it came or before it goes. The figures are
medians over rounds of SDK seconds / our seconds: 1 is as fast, less is slower. On a busy machine the same of CPU seconds
says more, and is given beside them; the service's own are not in it.

Steps: one CPU thread trains a small transformer; between, a checkpoint is uploaded by the process that carries a rank's
shards in a real run, over https with workload identity, committed through the log. The figure is the median step
while it uploads over the median step before and after. Azurite runs niced: it stands for a service elsewhere.

Here: the same of a run in a folder, whose checkpoint is committed by a thread and hashed by a process beside it.

Ahead: seconds until a machine that has nothing of a checkpoint of 256 MiB has it verified, and until one has to which it was brought
before (`launcher.storage.ahead`).

Needs azurite-blob on the PATH; with less than three cores free the figures say more about the machine than about us.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.azurite import ACCOUNT, KEY, Azurite, Entra

SETS = {"500 x 100 KB": (500, 100_000), "8 x 64 MiB": (8, 64 << 20)}


def plain_ways(
    url: str, threads: int, inside: int, hashed: bool = False
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Upload and download with the SDK alone: so many files at once, so many blocks at once inside each."""
    from azure.storage.blob import ContainerClient

    client = ContainerClient(
        url, "bench", credential=KEY, max_block_size=8 << 20, max_single_put_size=8 << 20,
        max_single_get_size=8 << 20, max_chunk_get_size=8 << 20,
    )  # fmt: skip

    def digest(path: Path) -> None:
        if hashed:
            with path.open("rb", buffering=0) as file:
                hashlib.file_digest(file, "sha256")

    def up(files: dict[str, Path]) -> None:
        def one(item: tuple[str, Path]) -> None:
            digest(item[1])
            with item[1].open("rb") as data:
                client.upload_blob(item[0], data, overwrite=True, max_concurrency=inside)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, files.items()))

    def down(files: dict[str, Path]) -> None:
        def one(item: tuple[str, Path]) -> None:
            with item[1].open("wb") as target:
                client.download_blob(item[0], max_concurrency=inside).readinto(target)
            digest(item[1])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, files.items()))

    return up, down


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock, and seconds of this process's CPU, which a busy machine changes little."""
    began, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - busy


def files(folder: Path, rounds: int) -> list[dict[str, Any]]:
    answers = []
    with Azurite(folder / "azurite") as azurite:
        azurite.create("bench")
        store = azurite.store("bench", "ours")
        for label, (count, size) in SETS.items():
            source = folder / "in"
            shutil.rmtree(source, ignore_errors=True)
            source.mkdir()
            for i in range(count):
                (source / str(i)).write_bytes(os.urandom(size))
            sources = {f"f-{i}": source / str(i) for i in range(count)}
            targets = {f"f-{i}": folder / "out" / str(i) for i in range(count)}
            (folder / "out").mkdir(exist_ok=True)
            ways = [(8, 1), (1, 8), (8, 1, True)] if size > 1 << 20 else [(8, 1), (16, 1), (16, 1, True)]
            plain: dict[Any, Any] = {way: plain_ways(azurite.url, *way) for way in ways}
            seconds: dict[str, dict[Any, list[float]]] = {"up": {}, "down": {}}
            cpu: dict[str, dict[Any, list[float]]] = {"up": {}, "down": {}}
            for turn in range(rounds + 1):
                for direction, files_of in (("up", sources), ("down", targets)):
                    order: list[tuple[Any, Callable[[], Any]]] = [
                        ("ours", lambda d=direction, f=files_of: (store.upload if d == "up" else store.download)(f)),
                        *((w, lambda u=u, f=files_of: u(f)) for w, u in ((w, p[direction == "down"]) for w, p in plain.items())),
                    ]  # fmt: skip
                    for name, work in order[turn % len(order) :] + order[: turn % len(order)]:
                        took, busy = timed(work)
                        if turn:  # the first round warms caches and connections
                            seconds[direction].setdefault(name, []).append(took)
                            cpu[direction].setdefault(name, []).append(busy)
            for direction, by in seconds.items():
                best = min((w for w in by if len(w) == 2), key=lambda w: statistics.median(by[w]))
                hashed = next(w for w in by if len(w) == 3)
                ratios = [theirs / ours for theirs, ours in zip(by[best], by["ours"], strict=True)]
                fair = [theirs / ours for theirs, ours in zip(by[hashed], by["ours"], strict=True)]
                busy = cpu[direction]
                answers.append(
                    {
                        "files": label, "direction": direction, "ours_s": round(statistics.median(by["ours"]), 3),
                        "sdk_s": round(statistics.median(by[best]), 3),
                        "sdk_best": f"{best[0]} files at once, {best[1]} blocks at once in each",
                        "ratio": round(statistics.median(ratios), 3), "lowest": round(min(ratios), 3),
                        "highest": round(max(ratios), 3),
                        "ratio_hashed": round(statistics.median(fair), 3),
                        "ours_cpu_s": round(statistics.median(busy["ours"]), 3),
                        "sdk_cpu_s": round(statistics.median(busy[best]), 3),
                        "sdk_hashed_cpu_s": round(statistics.median(busy[hashed]), 3),
                    }
                )  # fmt: skip
                print(answers[-1], file=sys.stderr, flush=True)
    return answers


def trainer() -> Callable[[], None]:
    import torch

    from launcher.workloads.gpt import GPT, GPTShape

    torch.set_num_threads(1)
    model = GPT(
        GPTShape(
            layers=2, width=96, heads=4, context=128, vocab=256, mlp_ratio=4, positions="rotary", tied=True
        )
    )
    model.initialise(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = torch.randint(0, 256, (4, 129))

    def step() -> None:
        optimizer.zero_grad()
        model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).backward()
        optimizer.step()

    return step


def steps(folder: Path, rounds: int) -> dict[str, Any]:
    from launcher.runspec.file import read_spec
    from launcher.runspec.model import RunSpec
    from launcher.storage.runfolder import RunFolder
    from launcher.training.upload import Carrier, staging

    with Azurite(folder / "azurite-tls", oauth=True) as azurite, Entra(azurite.certificate) as entra:
        os.setpriority(os.PRIO_PROCESS, azurite.pid, 19)
        azurite.create("bench")
        os.environ |= entra.environment | {
            "LOSSCAST_AZ_ENDPOINT": azurite.endpoint,
            "LOSSCAST_WORK": str(folder / "work"),
        }
        path = folder / "run.yaml"
        path.write_text(
            "name: bench\nworkload: {kind: gpt, layers: 2, width: 96, heads: 4, context: 128}\n"
            "data: {path: stdlib}\ntrain: {tokens: 1e6, batch_tokens: 512, lr: 1e-3, schedule: {kind: constant}}\n"
            f'checkpoints: {{url: "az://{ACCOUNT}/bench/runs"}}\n'
        )
        spec: RunSpec = read_spec(path)
        run = RunFolder.of(spec.checkpoints.url, spec.name)
        shards = folder / "shards"
        shards.mkdir()
        for i in range(4):
            (shards / f"shard-{i}").write_bytes(os.urandom(64 << 20))
        step = trainer()
        for _ in range(30):
            step()
        from launcher.training.saving import run_log

        with run_log(run).take("bench") as holding:
            carrier = Carrier(run, holding.attempt, spec, 0, 1)
            try:
                return _measure(run, holding.attempt, carrier, shards, step, rounds, staging)
            finally:
                carrier.close()


def here(folder: Path, rounds: int) -> dict[str, Any]:
    """The step while a checkpoint that lies in a run's own folder is hashed and committed by the thread that does it in a
    real run, over the step before and after. Writing the shards is not in it: that is on the step path."""
    from launcher.storage.checkpoints import commit_checkpoint, prefix_of
    from launcher.storage.runlog import RunLog
    from launcher.storage.store import FolderStore
    from launcher.training.underway import Committer

    root = folder / "here"
    shards = folder / "here-shards"
    shards.mkdir()
    for i in range(4):
        (shards / f"shard-{i}").write_bytes(os.urandom(64 << 20))
    step = trainer()
    for _ in range(30):
        step()
    log = RunLog(FolderStore(root), "bench")
    with log.take("bench") as holding:
        attempt = holding.attempt

        def commit(number: int, at_once: bool) -> None:
            commit_checkpoint(
                log.store, log, attempt=attempt, step=number, topology={"world": 1}, leisurely=not at_once
            )

        def place_of(run: Any, attempt: int, rank: int, number: int) -> Path:
            return root / prefix_of(attempt, number)

        committer = Committer(commit)

        class Carries:
            """A committer with the carrier's signature."""

            busy = property(lambda self: committer.busy)

            def carry(self, number: int, place: Path, patience_s: float) -> None:
                committer.carry(number)

            def outcome(self, number: int) -> str | None:
                return committer.outcome(number)

        return _measure(None, attempt, Carries(), shards, step, rounds, place_of)


def ahead(folder: Path, rounds: int) -> dict[str, Any]:
    from launcher.storage.ahead import bring_ahead
    from launcher.storage.checkpoints import commit_checkpoint, newest_verified, prefix_of
    from launcher.storage.runlog import RunLog

    source, cold, warm = folder / "ahead", list[float](), list[float]()
    source.mkdir()
    with Azurite(folder / "azurite-ahead") as azurite:
        azurite.create("bench")
        store = azurite.store("bench", "ahead")
        log = RunLog(store, "ahead")
        with log.take("bench") as holding:
            prefix = prefix_of(holding.attempt, 1)
            for i in range(4):
                (source / f"shard-{i}").write_bytes(os.urandom(64 << 20))
            sent = store.upload({prefix + path.name: path for path in source.iterdir()})
            digests = {key.removeprefix(prefix): digest for key, digest in sent.items()}
            commit_checkpoint(store, log, attempt=holding.attempt, step=1, topology={}, digests=digests)
        for turn in range(rounds):
            there = folder / f"brought-{turn}"
            bring_ahead(store, log, there, 1e12)
            for into, took in ((folder / f"bare-{turn}", cold), (there, warm)):
                took.append(timed(lambda into=into: newest_verified(store, log, into=into))[0])
                shutil.rmtree(into)
    return {"cold_s": round(statistics.median(cold), 2), "ahead_s": round(statistics.median(warm), 2)}


def _measure(
    run: Any, attempt: int, carrier: Any, shards: Path, step: Callable[[], None], rounds: int, staging: Any
) -> dict[str, Any]:
    pairs, moving, still = [], [], []
    for turn in range(1, rounds + 2):
        place = staging(run, attempt, 0, turn)
        place.mkdir(parents=True)
        for path in shards.iterdir():
            os.link(path, place / path.name)
        before = _steps(step, lambda began: time.perf_counter() - began < 2)
        carrier.carry(turn, place, patience_s=0)
        during = _steps(step, lambda began: carrier.busy)
        why = carrier.outcome(turn)
        if why is not None:
            raise RuntimeError(why)
        after = _steps(step, lambda began: time.perf_counter() - began < 2)
        if turn > 1:
            moving += during
            still += before + after
            pairs.append(statistics.median(during) / statistics.median(before + after))
    return {
        "uploaded": "256 MiB in 4 shards", "step_s": round(statistics.median(still), 5),
        "step_while_uploading_s": round(statistics.median(moving), 5), "uploads": len(pairs),
        "ratio": round(statistics.median(pairs), 3), "lowest": round(min(pairs), 3), "highest": round(max(pairs), 3),
    }  # fmt: skip


def _steps(step: Callable[[], None], go: Callable[[float], bool]) -> list[float]:
    began, took = time.perf_counter(), []
    while go(began):
        at = time.perf_counter()
        step()
        took.append(time.perf_counter() - at)
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("files", "steps", "here", "ahead"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.only != "here" and shutil.which("azurite-blob") is None:
        print("no azurite-blob here: npm install -g azurite. Nothing was measured.", file=sys.stderr)
        return 0
    answer: dict[str, Any] = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as folder:
        if args.only in (None, "files"):
            answer["files"] = files(Path(folder), args.rounds)
        if args.only in (None, "steps"):
            answer["steps"] = steps(Path(folder), args.rounds)
        if args.only in (None, "here"):
            answer["here"] = here(Path(folder), args.rounds)
        if args.only in (None, "ahead"):
            answer["ahead"] = ahead(Path(folder), args.rounds)
    if args.json:
        print(json.dumps(answer))
        return 0
    print(f"{answer['cores']} cores, load {answer['load']} at the start")
    for row in answer.get("files", []):
        print(
            f"{row['files']:>14} {row['direction']:<4}  ours {row['ours_s']:.2f} s, SDK {row['sdk_s']:.2f} s ({row['sdk_best']}): "
            f"{row['ratio']:.2f} of the SDK's speed ({row['lowest']:.2f} to {row['highest']:.2f}), {row['ratio_hashed']:.2f} "
            f"of the SDK's with sha256; CPU {row['ours_cpu_s']:.2f} s, SDK {row['sdk_cpu_s']:.2f} s, "
            f"with sha256 {row['sdk_hashed_cpu_s']:.2f} s"
        )
    if "ahead" in answer:
        row = answer["ahead"]
        print(
            f"256 MiB verified: {row['cold_s']:.2f} s on a machine without it, {row['ahead_s']:.2f} s where it was brought ahead"
        )
    for what, doing in (("steps", "are uploaded"), ("here", "in a folder are committed")):
        if what not in answer:
            continue
        row = answer[what]
        print(
            f"step {row['step_s'] * 1e3:.1f} ms, while {row['uploaded']} {doing} {row['step_while_uploading_s'] * 1e3:.1f} ms: "
            f"{row['ratio']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f}, {row['uploads']} times)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
