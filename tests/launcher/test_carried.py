"""What a run at az:// printed can be read on another machine, on a real Azurite."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.storage import carried, remote
from launcher.storage.carried import Carrier, bring
from launcher.storage.output import job_log, job_output, note_failure, rank_log
from launcher.storage.runfolder import RunFolder
from tests.azurite import Azurite

URL = "az://account/runs/team/tiny"


@pytest.fixture
def machines(azurite: Azurite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """machine(name): the run's folder on a machine of that name, all of them with one storage."""
    store = azurite.store("runs", tmp_path.name)
    monkeypatch.setattr(remote, "_opened", lambda url: store)
    monkeypatch.setattr(carried, "FIRST_S", 0.05)
    yield lambda name: RunFolder(tmp_path / name / "tiny", URL)


def test_what_a_job_printed_and_how_it_ended_is_there_on_another_machine(machines: Any) -> None:
    here, there = machines("here"), machines("there")
    with job_output(here, "tiny-1") as end:
        print("hello from the job")
        end.status = 1
    note_failure(here, 1, rank=3, cause="killed", message="x", step=7)
    bring(there, logs=True)
    assert job_log(there, "tiny-1").read_text() == "hello from the job\n"
    assert json.loads((there.path / "output" / "tiny-1.end.json").read_text())["status"] == 1
    assert json.loads((there.attempt(1) / "failure.json").read_text())["rank"] == 3


def test_pieces_come_back_in_order_however_often_they_are_brought(
    machines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carried, "PIECE_BYTES", 1000)
    here, there = machines("here"), machines("there")
    path = rank_log(here, 2, 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    carrier = Carrier(here, path)
    text = b""
    for i in range(40):
        line = f"line {i} ".encode() * 20 + b"\n"
        text += line
        with path.open("ab") as file:
            file.write(line)
        if i % 10 == 0:
            bring(there, logs=True)
    carrier.close()
    for _ in range(2):
        bring(there, logs=True)
        assert rank_log(there, 2, 0).read_bytes() == text


def test_a_job_that_begins_again_on_another_machine_goes_on_behind_what_it_had_said(machines: Any) -> None:
    for name in ("first", "second"):
        with job_output(machines(name), "tiny-1") as end:
            print(f"on the {name} machine")
            end.status = 0
    there = machines("there")
    bring(there, logs=True)
    assert job_log(there, "tiny-1").read_text() == "on the first machine\non the second machine\n"


def test_a_log_that_is_written_here_is_left_alone(machines: Any) -> None:
    here = machines("here")
    with job_output(here, "tiny-1") as end:
        print("one")
        end.status = 0
    with job_log(here, "tiny-1").open("a") as file:
        file.write("two, not yet carried\n")
    bring(here, logs=True)
    assert job_log(here, "tiny-1").read_text() == "one\ntwo, not yet carried\n"


def test_storage_that_is_away_delays_and_does_not_break(
    machines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = machines("here"), machines("there")
    store = remote.store_of(here)

    def away(folder: RunFolder) -> Any:
        raise OSError("no route")

    path = rank_log(here, 1, 0)
    path.parent.mkdir(parents=True)
    path.write_text("said while it was away\n")
    monkeypatch.setattr(remote, "store_of", away)
    carrier = Carrier(here, path)
    carrier._sent, carrier._base = 0, 0
    note_failure(here, 1, rank=0, cause="storage", message="x", step=1)
    monkeypatch.setattr(remote, "store_of", lambda folder: store)
    carrier.close()
    bring(there, logs=True)
    assert rank_log(there, 1, 0).read_text() == "said while it was away\n"
