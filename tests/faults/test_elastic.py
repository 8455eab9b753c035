"""Shards of two ranks are read by one, and its by two, through DeepSpeed's universal form: the losses go on as before."""

import csv
import threading
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.faults
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")

from launcher.ports import free_port  # noqa: E402
from launcher.recovery.elastic import fitted, to_universal  # noqa: E402
from launcher.recovery.owning import Ownership  # noqa: E402
from launcher.recovery.rank import RankProcess  # noqa: E402
from launcher.runspec.model import RunSpec  # noqa: E402
from launcher.storage.runfolder import RunFolder, write_whole  # noqa: E402
from tests.faults.training import spec_of  # noqa: E402


@pytest.mark.parametrize("zero", [2])  # 1 is what test_hosts shrinks by
def test_half_the_ranks_go_on_with_the_same_losses(tmp_path: Path, zero: int) -> None:
    spec = spec_of(tmp_path, "half", steps=60, every=20, zero=zero)
    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    folder.path.mkdir(parents=True)
    write_whole(folder.spec, spec.to_dict())
    owner = Ownership(folder, spec, "s", print)
    owner.take()
    ranks = [RankProcess({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}) for _ in range(2)]

    def train(on: RunSpec, **more: Any) -> dict[int, float]:
        attempt, port = owner.next_attempt(), str(free_port())
        assignment = {
            "spec": on.to_dict(), "folder": str(folder.path), "attempt": attempt, "cache": str(tmp_path / "cache"), **more,
        }  # fmt: skip
        answers: list[Any] = [None] * on.ranks

        def one(rank: int) -> None:
            answers[rank] = ranks[rank].train(
                assignment,
                {"RANK": str(rank), "WORLD_SIZE": str(on.ranks), "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            )  # fmt: skip

        threads = [threading.Thread(target=one, args=(r,)) for r in range(on.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for rank in ranks:
            rank.end()
        assert all("outcome" in a for a in answers), answers
        with folder.curve(attempt).open(newline="") as file:
            return {int(r["step"]): float(r["loss"]) for r in csv.DictReader(file)}

    try:
        whole = train(spec)
        step20 = folder.path / "attempts/1/checkpoints/step-20"
        path = to_universal(step20, tmp_path / "universal", print)
        half = train(fitted(spec, 1), resume_step=20, resume_from=str(path), universal=True)
        step40 = to_universal(folder.path / "attempts/2/checkpoints/step-40", tmp_path / "back", print)
        again = train(spec, resume_step=40, resume_from=str(step40), universal=True)
    finally:
        for rank in ranks:
            rank.close()
        owner.close()
    assert half == pytest.approx({s: loss for s, loss in whole.items() if s > 20}, abs=1e-4)
    assert again == pytest.approx({s: loss for s, loss in whole.items() if s > 40}, abs=1e-4)
