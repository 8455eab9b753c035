"""One seed and one corpus give one loss curve, however the model is laid out over ranks, also through a stop and a resume.

Losses, validation losses and gradient norms of the same 20 steps, in fp32 within float tolerance. The norm is clipped at
every step (grad_clip is under it), so that a layout which clips by some other norm shows.
"""

import csv
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")

from launcher.jobs import local_ray  # noqa: E402
from launcher.storage.runfolder import RunFolder  # noqa: E402
from launcher.training.saving import run_log  # noqa: E402

LONG = pytest.mark.skipif(
    os.environ.get("LOSSCAST_FAULTS") != "long", reason="more of the same; LOSSCAST_FAULTS=long runs it"
)
SPEC = """
name: {name}
workload: {{kind: gpt, layers: 3, width: 16, heads: 2, context: 32{workload}}}
data: {{path: {data}, holdout_tokens: 2048}}
train:
  {{tokens: 5120, batch_tokens: 256, lr: 0.03, lr_base_width: 16, schedule: {{kind: linear, warmup_tokens: 1024}}, seed: 3,
    optimizer: {{grad_clip: 0.05}}, precision: {precision}}}
eval: {{every_steps: 8, batches: 3}}
parallel: {{{parallel}}}
checkpoints: {{url: {runs}, every_steps: 100}}
"""
OTHER = ", positions: learned, tied: false"
IMAGES = ", patch: 2"
"""A vision-language model: 16 of the 32 positions are patches."""
FP32, BF16 = 2e-5, 6e-3
"""How far a loss of about 5 nats may be from the reference."""


@dataclass(frozen=True)
class Layout:
    """One way to lay a run out."""

    name: str
    parallel: str
    workload: str = ""
    precision: str = "fp32"
    stop: int | None = None
    """Stop after so many steps, and go on from the checkpoint."""


REFERENCE = [
    Layout("one", "dp: 1, zero: 0"),
    Layout("one-other", "dp: 1, zero: 0", OTHER),
    Layout("one-images", "dp: 1, zero: 0", IMAGES),
]
GROUPS: dict[str, tuple[int, list[Layout]]] = {
    "data parallel": (
        2,
        [
            Layout("zero0", "dp: 2, zero: 0"),
            Layout("zero1", "dp: 2, zero: 1"),
            Layout("zero2-accumulated", "dp: 2, zero: 2, micro_batch: 2"),
            Layout("zero3", "dp: 2, zero: 3", stop=11),
            Layout("zero3-recomputed", "dp: 2, zero: 3, activation_checkpointing: true, micro_batch: 1"),
            Layout("zero1-offloaded", "dp: 2, zero: 1, offload: cpu"),
            Layout("zero2-offloaded", "dp: 2, zero: 2, offload: cpu, micro_batch: 2", stop=7),
            Layout("zero2-bf16", "dp: 2, zero: 2", precision="bf16"),
            Layout("zero1-other", "dp: 2, zero: 1", OTHER),
            Layout("zero3-images", "dp: 2, zero: 3, micro_batch: 2", IMAGES),
        ],
    ),
    "pipeline": (
        2,
        [
            Layout("pp-zero0", "pp: 2, zero: 0, micro_batch: 2"),
            Layout("pp-zero1", "pp: 2, zero: 1, micro_batch: 2", stop=11),
            Layout("pp-recomputed", "pp: 2, zero: 1, micro_batch: 1, activation_checkpointing: true"),
            Layout("pp-zero0-other", "pp: 2, zero: 0, micro_batch: 4", OTHER),
            Layout("pp-images", "pp: 2, zero: 1, micro_batch: 2", IMAGES),
        ],
    ),
    "tensor parallel": (
        2,
        [
            Layout("tp-zero0", "tp: 2, zero: 0"),
            Layout("tp-zero1", "tp: 2, zero: 1, micro_batch: 4", stop=11),
            Layout("tp-zero2", "tp: 2, zero: 2, micro_batch: 2, activation_checkpointing: true"),
            Layout("tp-zero1-other", "tp: 2, zero: 1", OTHER),
        ],
    ),
    "pipeline x data": (4, [Layout("pp-dp", "pp: 2, dp: 2, zero: 1, micro_batch: 2", stop=11)]),
}
MORE: dict[str, tuple[int, list[Layout]]] = {
    "data parallel": (
        2,
        [
            Layout("zero3-offloaded", "dp: 2, zero: 3, offload: cpu", stop=5),
            Layout(
                "zero3-offloaded-recomputed", "dp: 2, zero: 3, offload: cpu, activation_checkpointing: true"
            ),
            Layout("zero1-bf16", "dp: 2, zero: 1, micro_batch: 2", precision="bf16"),
            Layout("zero3-bf16", "dp: 2, zero: 3", precision="bf16"),
        ],
    ),
    "pipeline": (
        2,
        [
            Layout("pp-zero1-bf16", "pp: 2, zero: 1, micro_batch: 2", precision="bf16"),
            Layout("pp-zero1-offloaded", "pp: 2, zero: 1, micro_batch: 2, offload: cpu"),
        ],
    ),
    "pipeline x data": (
        4,
        [
            Layout("pp-dp-zero0", "pp: 2, dp: 2, zero: 0, micro_batch: 2", stop=11),
            Layout("pp-dp-other", "pp: 2, dp: 2, zero: 1, micro_batch: 1", OTHER),
        ],
    ),
    "pipeline of 3": (3, [Layout("pp3", "pp: 3, zero: 1, micro_batch: 2", stop=11)]),
    "tensor x data": (
        4,
        [
            Layout("tp-dp-zero0", "tp: 2, dp: 2, zero: 0"),
            Layout("tp-dp-zero1", "tp: 2, dp: 2, zero: 1", stop=11),
            Layout("tp-dp-zero2", "tp: 2, dp: 2, zero: 2"),
        ],
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("topologies")


def train(home: Path, ranks: int, layouts: list[Layout]) -> None:
    """Train every layout, in one set of processes."""
    runs = []
    for x in layouts:
        if x.workload == IMAGES:
            pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'losscast[vision]'")
        path = home / f"{x.name}.yaml"
        path.write_text(
            SPEC.format(
                name=x.name,
                runs=home / "runs",
                parallel=x.parallel,
                workload=x.workload,
                precision=x.precision,
                data="digits" if x.workload == IMAGES else "stdlib",
            )
        )
        runs.append(f"{path}@{x.stop}" if x.stop else str(path))
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={local_ray.free_port()}",
        str(Path(__file__).with_name("many_layouts.py")), *runs,
    ]  # fmt: skip
    env = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "LOSSCAST_CACHE": str(home / "cache")}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=560,
        env={**os.environ, **env, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def columns(home: Path, name: str) -> dict[str, list[float]]:
    """What a run says of its steps, whichever attempts it took."""
    heading, *rows = RunFolder(home / "runs" / name).whole_curve()
    assert [int(r[heading.index("step")]) for r in rows] == list(range(1, 21))
    found = {
        k: [float(r[heading.index(k)]) for r in rows if r[heading.index(k)]]
        for k in ("loss", "val_loss", "grad_norm")
    }
    assert [len(v) for v in found.values()] == [20, 3, 20]
    return found


@pytest.fixture(scope="module")
def reference(home: Path) -> dict[str, dict[str, list[float]]]:
    train(home, 1, REFERENCE)
    found = {x.workload: columns(home, x.name) for x in REFERENCE}
    for curve in found.values():
        assert curve["loss"][-1] < curve["loss"][0] - 0.4
        assert min(curve["grad_norm"]) > 0.05, "clipped at every step, or a wrong norm would not show"
    return found


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        *(pytest.param(*group, id=name) for name, group in GROUPS.items()),
        *(pytest.param(*group, id=f"more {name}", marks=LONG) for name, group in MORE.items()),
    ],
)
def test_one_seed_gives_one_loss_curve_in_every_layout(
    home: Path, reference: dict[str, dict[str, list[float]]], ranks: int, layouts: list[Layout]
) -> None:
    train(home, ranks, layouts)
    wrong = {}
    for x in layouts:
        within = FP32 if x.precision == "fp32" else BF16
        for key, values in columns(home, x.name).items():
            should = reference[x.workload][key]
            off = max(abs(a - b) for a, b in zip(values, should, strict=True))
            if not off <= within:
                wrong[f"{x.name} {key}"] = off
        attempts = list((home / "runs" / x.name / "attempts").iterdir())
        assert len(attempts) == (2 if x.stop else 1)
        entries = run_log(RunFolder(home / "runs" / x.name)).entries()
        kept = [int(e.fields["step"]) for e in entries if e.kind == "commit"]
        assert kept == ([3, x.stop, x.stop + 3, 20] if x.stop else [3, 20]), (
            "asked a step apart, committed once"
        )
        if x.stop:
            with (home / "runs" / x.name / "attempts" / "2" / "curve.csv").open() as file:
                assert int(next(csv.DictReader(file))["step"]) == x.stop + 1, "it went on from its checkpoint"
    assert wrong == {}
