"""The estimate of memory against the real engine."""

import pytest

from launcher.errors import WrongInput
from launcher.measure import measured_peaks
from launcher.memory import rank_memory
from launcher.spec import RunSpec


def run(ranks: int, zero: int = 1) -> RunSpec:
    return RunSpec.from_dict(
        {
            "name": "m",
            "workload": {"layers": 2, "width": 256, "heads": 4, "context": 128},
            "data": {"path": "stdlib"},
            "train": {"tokens": 1e5, "batch_tokens": 2048 * ranks, "lr": 1e-3},
            "parallel": {"dp": ranks, "zero": zero},
        }
    )


@pytest.mark.e2e
@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 1)])
def test_the_measured_peak_is_near_the_estimate(ranks: int, zero: int) -> None:
    spec = run(ranks, zero)
    estimated = (rank_memory(spec) or [])[0].total
    peaks = measured_peaks(spec)
    assert len(peaks) == ranks
    assert estimated == pytest.approx(max(peaks), rel=0.2)


def test_what_does_not_fit_one_machine_is_not_measured() -> None:
    with pytest.raises(WrongInput, match="at most 8 ranks"):
        measured_peaks(run(16))
