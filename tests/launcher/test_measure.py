"""The estimate of memory against the real engine."""

from typing import Any

import pytest

from launcher.errors import WrongInput
from launcher.plan.measure import measured_peaks
from launcher.runspec.model import RunSpec
from launcher.training.memory import rank_memory


def run(dp: int, zero: int = 1, **parallel: Any) -> RunSpec:
    return RunSpec.from_dict(
        {
            "name": "m",
            "workload": {"layers": 2, "width": 256, "heads": 4, "context": 128},
            "data": {"path": "stdlib"},
            "train": {"tokens": 1e5, "batch_tokens": 2048 * dp, "lr": 1e-3},
            "parallel": {"dp": dp, "zero": zero, **parallel},
        }
    )


@pytest.mark.e2e
@pytest.mark.parametrize(
    "spec",
    [
        run(1, 0), run(2, 1), run(2, 2, offload="cpu"), run(2, 3), run(2, 3, offload="cpu"),
        run(1, 1, pp=2, micro_batch=4), run(1, 1, tp=2),
    ],
)  # fmt: skip
def test_the_measured_peak_of_every_stage_is_near_the_estimate(spec: RunSpec) -> None:
    stages, peaks = rank_memory(spec) or [], measured_peaks(spec)
    assert len(peaks) == spec.ranks
    share = len(peaks) // len(stages)
    for stage, estimate in enumerate(stages):
        measured = max(peaks[stage * share : (stage + 1) * share])
        assert estimate.total + estimate.host == pytest.approx(measured, rel=0.2), f"stage {stage}"


def test_tensor_parallelism_splits_the_blocks_and_leaves_embeddings_whole() -> None:
    (whole,), (half,) = rank_memory(run(1, 0)) or [], rank_memory(run(1, 0, tp=2)) or []
    blocks = 4 * 2 * 12 * 256 * 256  # bytes: layers x 12 width squared
    assert half.parameters == whole.parameters - blocks / 2
    assert whole.activations / 2 < half.activations < whole.activations and half.logits == whole.logits


def test_what_does_not_fit_one_machine_is_not_measured() -> None:
    with pytest.raises(WrongInput, match="at most 8 ranks"):
        measured_peaks(run(16))
