"""A person goes back: `losscast resume RUN --back-to STEP --skip FIRST:LAST`, as the advice names them."""

from pathlib import Path

import pytest

from launcher.cli import main
from launcher.errors import WrongInput
from launcher.recovery.rollback import MOST, Rollbacks, go_back
from launcher.runspec.file import read_spec
from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import RunFolder, write_whole
from launcher.training.assignment import Assignment
from launcher.training.saving import run_log

SPEC = """name: r
workload: {{kind: gpt, layers: 1, width: 32, heads: 2, context: 32}}
data: {{path: stdlib}}
train: {{tokens: 51200, batch_tokens: 256, lr: 1e-3, schedule: {{kind: constant}}}}
checkpoints: {{url: {runs}, every_steps: 10}}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunFolder, RunSpec]:
    """A run of 200 steps that ended at 100, with checkpoints of 20, 40 and 60."""
    monkeypatch.setenv("LOSSCAST_HOME", str(tmp_path / "home"))
    (tmp_path / "run.yaml").write_text(SPEC.format(runs=tmp_path / "runs"))
    spec = read_spec(str(tmp_path / "run.yaml"))
    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    folder.path.mkdir(parents=True)
    write_whole(folder.spec, spec.to_dict())
    holding = run_log(folder).take("one")
    for step in (20, 40, 60):
        holding.append("commit", step=step, manifest=f"m{step}", manifest_sha256="0" * 64)
    holding.release()
    return folder, spec


def commits(folder: RunFolder) -> list[int]:
    return [int(e.fields["step"]) for e in run_log(folder).commits()]


def test_newer_checkpoints_count_no_more_and_the_batches_are_left_out(run: tuple[RunFolder, RunSpec]) -> None:
    folder, spec = run
    step, write = go_back(folder, spec, 55, (58, 64))
    assert step == 40 and commits(folder) == [60, 40, 20]  # nothing yet: it has to be agreed to
    write()
    assert commits(folder) == [40, 20]
    skips = Rollbacks.read(folder, spec).skips
    assert skips == [[58, 7]]
    plan = Assignment({}, "", 2, "", skips=skips)
    assert [plan.batch(s) for s in (57, 58, 59)] == [56, 64, 65]


def test_a_persons_rollback_takes_none_of_the_runs_own(run: tuple[RunFolder, RunSpec]) -> None:
    folder, spec = run
    for _ in range(MOST + 1):
        go_back(folder, spec, 60, None)[1]()
    found = Rollbacks.read(folder, spec)
    assert found.unasked == 0 and Assignment({}, "", 2, "", skips=found.skips).batch(61) == 60


@pytest.mark.parametrize(
    ("step", "skip", "words"),
    [
        (19, None, "the oldest is of step 20"),
        (60, (50, 70), "both after step 60"),
        (60, (70, 65), "both after step 60"),
        (60, (61, 201), "up to 200"),
    ],
)
def test_what_can_not_be_gone_back_to_is_said(
    run: tuple[RunFolder, RunSpec], step: int, skip: tuple[int, int] | None, words: str
) -> None:
    with pytest.raises(WrongInput, match=words):
        go_back(*run, step, skip)


def test_the_command_refuses_before_it_changes_anything(
    run: tuple[RunFolder, RunSpec], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    yaml = str(tmp_path / "run.yaml")
    assert main(["resume", yaml, "--skip", "3:4"]) == 2 and "--back-to" in capsys.readouterr().err
    assert (
        main(["resume", yaml, "--back-to", "5"]) == 2
        and "the oldest is of step 20" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main(["resume", yaml, "--back-to", "40", "--skip", "x"])
    assert commits(folder) == [60, 40, 20]
