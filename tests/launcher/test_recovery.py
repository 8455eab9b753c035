"""What decides recovery, without a cluster: causes, waits, notices, fewer ranks, books, rollbacks."""

import itertools
import os
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import Held
from launcher.netif import interface_of
from launcher.recovery.elastic import fewest_ranks, fitted, needs_universal
from launcher.recovery.failures import RankFailed, blame, seen_in
from launcher.recovery.goodput import Ledger
from launcher.recovery.owning import AlreadyOver, wait_for_turn
from launcher.recovery.preempt import Watch, read_notices
from launcher.recovery.restarts import Failure, Restarts
from launcher.recovery.rollback import RollBack, Rollbacks, wanted
from launcher.runspec.model import Policy, RunSpec
from launcher.storage.record import Record
from launcher.storage.runfolder import RunFolder, steps_after
from launcher.storage.runlog import RunLog
from launcher.storage.store import FolderStore
from launcher.training import warm

# restarts


def test_a_crash_loop_is_given_up_with_its_own_first_error_and_not_an_older_one() -> None:
    restarts = Restarts(Policy())
    assert restarts.failed(Failure("killed", "long ago", 100)).give_up is None
    said = [restarts.failed(Failure("raised", f"try {n}", 250)) for n in range(1, 5)]
    assert [v.give_up is None for v in said] == [True, True, True, False]
    assert said[-1].error is not None and said[-1].error.message == "try 1"


def test_steps_gained_make_it_a_new_story() -> None:
    restarts = Restarts(Policy(max_restarts=100))
    assert all(restarts.failed(Failure("raised", "x", n)).give_up is None for n in range(50))


def test_an_error_of_the_run_waits_longer_each_time_and_a_kill_does_not_wait() -> None:
    restarts = Restarts(Policy())
    assert restarts.failed(Failure("killed", "x", 5)).wait_s == 0
    waits = [restarts.failed(Failure("raised", "x", 5)).wait_s for _ in range(2)]
    assert waits == sorted(waits) and waits[0] >= 1 and waits[1] > waits[0]


def test_max_restarts_counts_failures_and_no_preemptions() -> None:
    restarts = Restarts(Policy(max_restarts=3))
    for n in range(20):
        assert restarts.failed(Failure("preempted", "spot", n)).give_up is None
    verdicts = [restarts.failed(Failure("killed", f"k{n}", 100 + n)) for n in range(4)]
    assert [v.give_up is None for v in verdicts] == [True, True, True, False]
    assert verdicts[-1].error is not None and verdicts[-1].error.message == "k0"
    assert restarts.told() == "4 killed, 20 preempted"


# which failure came first


def test_a_killed_rank_is_blamed_before_its_neighbours_complaints() -> None:
    echo = seen_in(0, {"raised": {"type": "RuntimeError", "message": "Connection closed by peer"}}, False)
    own = seen_in(2, {"raised": {"type": "KeyError", "message": "'lr'"}}, False)
    killed = seen_in(1, {"died": {"signal": 9, "status": None}}, False)
    assert echo and own and killed
    assert blame([echo, own]) is own
    assert blame([echo, own, killed]) is killed
    assert killed.cause == "killed" and "SIGKILL" in killed.message


def test_a_death_under_notice_is_a_preemption() -> None:
    failure = seen_in(1, {"died": {"signal": 15, "status": None}}, True)
    assert failure is not None and failure.cause == "preempted"
    assert seen_in(1, {"outcome": {}}, True) is None
    with pytest.raises(ValueError):
        blame([])


def test_a_failure_says_its_rank() -> None:
    assert str(RankFailed(3, "raised", "x")) == "rank 3: x"
    assert str(RankFailed(None, "hung", "x")) == "x"


# notices


def event(number: int, kind: str = "Preempt", at: float | None = None, **more: Any) -> dict[str, Any]:
    return {
        "EventId": f"e{number}", "EventType": kind, "EventStatus": "Scheduled", "ResourceType": "VirtualMachine",
        "Resources": ["vm_1"], "NotBefore": formatdate(at, usegmt=True) if at is not None else "", **more,
    }  # fmt: skip


def test_only_what_takes_this_machine_away_is_a_notice() -> None:
    document = {
        "DocumentIncarnation": 2,
        "Events": [
            event(1),
            event(2, "Freeze"),
            event(3, Resources=["vm_2"]),
            event(4, "Terminate", at=1000.0),
            event(5, EventStatus="Completed"),
            "rubbish",
            event(6, NotBefore="next week"),
        ],
    }
    found = read_notices(document, "vm_1")
    assert sorted(found) == ["e1", "e4", "e6"]
    assert found["e4"].not_before == 1000.0 and found["e6"].not_before is None
    assert sorted(read_notices(document, None)) == ["e1", "e3", "e4", "e6"]
    for strange in (None, [], {"Events": None}, {"Events": {"a": 1}}):
        assert read_notices(strange, "vm_1") == {}


def saves(schedule: dict[float, list[dict[str, Any]]], until: float) -> list[float]:
    """When a checkpoint is asked for, where the service answers so from those seconds on."""
    watch, asked, answer = Watch(), [], []
    for now in [t / 2 for t in range(int(2 * until))]:
        answer = schedule.get(now, answer)
        watch.update(read_notices({"Events": answer}, "vm_1"), now)
        if watch.save_now(now):
            asked.append(now)
    return asked


def test_a_notice_is_answered_once_and_one_far_ahead_again_before_its_time() -> None:
    assert saves({5.0: [event(1, at=35.0)]}, 60) == [5.0]
    assert saves({5.0: [event(1, "Terminate", at=305.0)]}, 400) == [5.0, 275.0]


def test_a_withdrawn_notice_that_comes_back_is_answered_again_and_flapping_is_bounded() -> None:
    assert saves({5.0: [event(1)], 8.0: [], 50.0: [event(1)]}, 100) == [5.0, 50.0]
    flapping = {float(t): [event(t)] if t % 2 else [] for t in range(100)}
    asked = saves(flapping, 100)
    assert 5 <= len(asked) <= 11
    assert min(b - a for a, b in itertools.pairwise(asked)) >= 10.0


# fewer ranks

SPEC: dict[str, Any] = {
    "name": "e",
    "workload": {"kind": "gpt", "layers": 2, "width": 16, "heads": 1, "context": 32},
    "data": {"path": "stdlib"},
    "train": {"tokens": 32 * 48 * 10, "batch_tokens": 32 * 48, "lr": 0.01},
    "parallel": {"dp": 8, "zero": 1, "micro_batch": 6},
    "cluster": {"to": "http://head:8265", "nodes": {"min": 1, "max": 4}, "gpus_per_node": 2, "gpu": "H100"},
}


@pytest.mark.parametrize(("ranks", "dp"), [(8, 8), (9, 8), (7, 6), (6, 6), (5, 4), (2, 2), (1, 1)])
def test_fewer_ranks_train_on_the_same_batch(ranks: int, dp: int) -> None:
    spec = RunSpec.from_dict(SPEC)
    small = fitted(spec, ranks)
    assert small.parallel.dp == dp and small.ranks <= max(ranks, 1)
    assert small.batch_sequences == spec.batch_sequences == dp * small.micro_batch * small.accumulation
    assert small.total_steps == spec.total_steps
    assert RunSpec.from_dict(small.to_dict()) == small


def test_fewer_ranks_than_a_replica_takes_are_refused() -> None:
    spec = RunSpec.from_dict({**SPEC, "parallel": {"dp": 4, "pp": 2, "zero": 1}})
    with pytest.raises(ValueError, match="takes pp x tp = 2"):
        fitted(spec, 1)


@pytest.mark.parametrize(("parallel", "fewest"), [({"dp": 8, "zero": 2}, 2), ({"dp": 8, "zero": 3}, 8)])
def test_a_run_whose_shards_fewer_ranks_can_not_read_exactly_waits_for_all(
    parallel: dict[str, int], fewest: int
) -> None:
    assert fewest_ranks(RunSpec.from_dict({**SPEC, "parallel": parallel})) == fewest


@pytest.mark.parametrize(
    ("written", "zero", "needs"),
    [
        ({"dp": 8, "pp": 1, "tp": 1, "zero": 1}, 1, False),
        ({"dp": 4, "pp": 1, "tp": 1, "zero": 1}, 1, True),
        ({"dp": 4, "pp": 1, "tp": 1, "zero": 0}, 0, False),
        ({"dp": 8, "pp": 1, "tp": 1, "zero": 0}, 1, True),
        ({"dp": 4, "pp": 2, "tp": 1, "zero": 0}, 0, True),
    ],
)
def test_when_shards_have_to_be_converted(written: dict[str, int], zero: int, needs: bool) -> None:
    spec = RunSpec.from_dict({**SPEC, "parallel": {"dp": 8, "zero": zero}})
    assert needs_universal(written, spec) is needs


# books


def test_every_gpu_second_is_useful_lost_or_idle() -> None:
    book = Ledger(price_per_gpu_hour=3600.0)
    book.begin(ranks=4, start_step=0, now=0.0)
    for step in range(1, 101):
        book.saw(step, now=10.0 + step)
    book.end(111.0)
    assert book.settle(kept_step=80, now=120.0) == 20
    assert (book.useful_s, book.lost_s) == (pytest.approx(320.0), pytest.approx(80.0))
    assert book.total_s == pytest.approx(4 * 120.0)
    assert book.fields()["dollars_lost"] == pytest.approx(80.0)
    assert "20 steps trained twice" in book.told()


def test_an_attempt_that_made_no_step_is_idle_and_books_go_on_through_drivers(tmp_path: Path) -> None:
    book = Ledger.read(tmp_path / "goodput.json", None)
    book.begin(2, 50, 0.0)
    book.end(30.0)
    assert book.settle(50, 30.0) == 0
    assert (book.useful_s, book.lost_s, book.idle_s) == (0, 0, 60.0)
    book.write(tmp_path / "goodput.json")
    again = Ledger.read(tmp_path / "goodput.json", 2.0)
    assert again.idle_s == 60.0 and again.attempts == 1 and again.price_per_gpu_hour == 2.0
    (tmp_path / "goodput.json").write_text("{")
    assert Ledger.read(tmp_path / "goodput.json", None).total_s == 0


def living() -> Ledger:
    """Two ranks since 0 s, a step a second from 11 s on, the newest of them 60."""
    book = Ledger()
    book.begin(2, 0, 0.0)
    for step in range(1, 61):
        book.saw(step, 10.0 + step)
    return book


def test_what_a_commit_holds_is_booked_while_the_attempt_trains_on() -> None:
    book, whole = living(), living()
    assert not book.keep(60), "a step after the commit says how long its steps took"
    assert book.keep(40) and not book.keep(40) and not book.keep(20)
    assert (book.useful_s, book.lost_s, book.idle_s) == (pytest.approx(80.0), 0, pytest.approx(20.0))
    assert book.keep(50) and book.useful_s == pytest.approx(100.0)
    for each in (book, whole):
        each.saw(80, 90.0)
        each.end(91.0)
        assert each.settle(50, 95.0) == 30
        assert each.total_s == pytest.approx(2 * 95.0) and each.lost_s == pytest.approx(60.0)
    assert book.fields() == whole.fields()


@pytest.mark.parametrize("kept", [50, 45, 0])
def test_steps_that_were_booked_and_then_left_are_lost(kept: int) -> None:
    book, whole = living(), living()
    assert book.keep(30) and book.keep(50)
    for each in (book, whole):
        each.end(70.0)
        assert each.settle(kept, 75.0) == 60 - kept
    assert book.fields() == pytest.approx(whole.fields())


# rollbacks

ADVICE = {"action": "roll_back", "step": 130, "evidence": ["off its line for good since step 110"]}
ALERT = {"alert": "LossDiverged", "step": 130, "since_step": 110, "resolved_step": None}


def asked(advice: Any = ADVICE, alerts: Any = None, resumed_at: int = 0, seen: int = 140) -> Any:
    return wanted(advice, [ALERT] if alerts is None else alerts, resumed_at=resumed_at, seen=seen)


def test_a_rollback_goes_before_the_onset_and_leaves_out_what_followed() -> None:
    assert asked() == (110, 130, "off its line for good since step 110")
    worse = {**ALERT, "alert": "LossNonFinite", "since_step": 135, "step": 135}
    assert asked(alerts=[ALERT, worse])[:2] == (110, 135)


@pytest.mark.parametrize(
    "change",
    [
        {"advice": {**ADVICE, "action": "continue"}},
        {"advice": None},
        {"alerts": []},
        {"alerts": [{**ALERT, "resolved_step": 135}]},
        {"alerts": [{**ALERT, "alert": "LossOffLine"}]},
        {"resumed_at": 120},
        {"seen": 120},
        {"alerts": {"error": "x"}},
    ],
)
def test_nothing_is_rolled_back_without_a_reason_in_this_attempt(change: dict[str, Any]) -> None:
    assert asked(**change) is None


def test_a_rollback_whose_outcome_was_open_is_written_down_once(tmp_path: Path) -> None:
    """Twice in the log, the next driver would leave twice the batches out."""
    folder = RunFolder(tmp_path / "r")
    folder.path.mkdir()
    log = RunLog(FolderStore(folder.path), "r")
    with log.take("s") as holding:
        ask = RollBack(110, 130, "off its line")
        for _ in range(2):  # as after an answer that was lost
            Rollbacks([], 0).add(folder, holding.attempt, ask)
        Rollbacks([], 0).add(folder, holding.attempt, RollBack(90, 130, "off its line"))
    assert [e.fields["step"] for e in log.entries() if e.kind == "rollback"] == [109, 89]


def test_commits_that_a_rollback_made_void_are_not_resumed_from(tmp_path: Path) -> None:
    log = RunLog(FolderStore(tmp_path), "r")
    with log.take("s") as holding:
        for step in (50, 100, 150):
            holding.commit(step, f"m{step}", "0" * 64)
        holding.append("rollback", step=109)
        assert [e.fields["step"] for e in log.commits()] == [100, 50]
        holding.commit(120, "m120", "0" * 64)
        assert [e.fields["step"] for e in RunLog(FolderStore(tmp_path), "r").commits()] == [120, 100, 50]


def test_the_loopback_has_an_interface() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") is None


# one that stands by


def test_imports_set_aside_give_way_and_what_is_forked_later_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    seen: list[int] = []
    monkeypatch.setattr(warm, "warm_up", lambda: seen.append(os.getpriority(os.PRIO_PROCESS, 0)))
    warm.warm_up_aside()
    assert seen == [min(19, before + warm.ASIDE_NICE)] and os.getpriority(os.PRIO_PROCESS, 0) == before

    def broken() -> None:
        raise ImportError("no torch here")

    monkeypatch.setattr(warm, "warm_up", broken)
    with pytest.raises(ImportError, match="no torch here"):
        warm.warm_up_aside()


# an entrypoint that is started twice


def test_a_second_start_of_an_entrypoint_waits_for_the_first_and_begins_nothing_again(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "twice")
    holding = RunLog(FolderStore(folder.path), "twice").take("s-1")
    said: list[str] = []
    found: list[BaseException] = []

    def second() -> None:
        try:
            wait_for_turn(folder, "s-1", said.append)
        except AlreadyOver as over:
            found.append(over)

    waiting = threading.Thread(target=second)
    waiting.start()
    try:
        while not said and waiting.is_alive():
            time.sleep(0.01)
        assert "attempt 1, submission s-1" in said[0] and not found
        with pytest.raises(Held, match="is held by attempt 1, submission s-1"):
            wait_for_turn(folder, "s-2", said.append)  # somebody else's is refused at once
    finally:
        holding.release()
        waiting.join(120)
    assert len(found) == 1
    wait_for_turn(folder, "s-1", said.append)  # whoever comes after the end, or resumes, goes on
    wait_for_turn(folder, "s-2", said.append)


@pytest.mark.parametrize("committed", [0, 40])
@pytest.mark.parametrize("lag_s", [0.0, 50.0])
def test_what_a_driver_that_went_without_a_word_had_open_is_booked_by_the_next(
    tmp_path: Path, committed: int, lag_s: float
) -> None:
    """lag_s: the recorder's clock is so much behind the driver's."""
    folder, path = RunFolder.at(str(tmp_path)), tmp_path / "goodput.json"
    book, began = Ledger(), time.monotonic()
    book.begin(2, 0, began, number=7)
    book.write(path)
    if committed:
        for step in range(1, committed + 2):
            book.saw(step, began + 10.0 + step)
        assert book.keep(committed)
        book.write(path)
    record = Record(folder.curve(7), "r", None)
    record.close()
    epoch = time.time() - time.monotonic() + began - lag_s
    with folder.curve(7).open("a") as file:
        file.writelines(f"r,{s},{s},1.0,,,,,{epoch + 10 + s:.3f}\r\n" for s in range(1, 61))
        file.write(f"r,61,61,1.0,,,,,{epoch:.0f}"[:-4])  # cut off by the kill
    found = Ledger.read(path, None)
    assert found.left is not None and found.left.number == 7 and not found.open
    steps = steps_after(folder, 7, found.left.start_step)
    assert [s for s, _ in steps] == list(range(committed + 1, 61))
    assert found.take_over(steps, committed) == 60 - committed and found.left is None
    assert (found.useful_s, found.lost_s) == (
        pytest.approx(2 * committed),
        pytest.approx(2 * (60 - committed), rel=0.06),
    )
    started_s = 0.0 if lag_s and not committed else 10.0  # the clocks' difference hides it
    assert found.idle_s == pytest.approx(2 * started_s, abs=3.0)
    assert found.take_over([], 0) == 0


def test_an_attempt_of_which_nothing_was_recorded_costs_no_books(tmp_path: Path) -> None:
    path = tmp_path / "goodput.json"
    book = Ledger(useful_s=5.0)
    book.begin(2, 40, time.monotonic(), number=2)
    book.write(path)
    found = Ledger.read(path, None)
    assert found.take_over(steps_after(RunFolder.at(str(tmp_path)), 2, 40), 40) == 0 and found.total_s == 5.0
    path.write_text(path.read_text().replace('"ranks"', '"of another version"'))
    assert Ledger.read(path, None).left is None and Ledger.read(path, None).useful_s == 5.0


def test_only_the_end_of_a_long_curve_is_read(tmp_path: Path) -> None:
    folder = RunFolder.at(str(tmp_path))
    record = Record(folder.curve(1), "long", 5)
    for step in range(1, 20_001):
        record.add(step, step * 256, 2.5, None, 1e-3, 0.1)
    record.close()
    assert [s for s, _ in steps_after(folder, 1, 19_990)] == list(range(19_991, 20_001))
    assert len(steps_after(folder, 1, 5)) == 19_995 and steps_after(folder, 2, 0) == []
