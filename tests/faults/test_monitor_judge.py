"""The judge's process dies, hangs, or can't keep up: samples are taken all the same, and no verdict changes."""

import math
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from monitor.judging import apart
from monitor.judging.apart import Apart
from monitor.service.monitor import Monitor
from tests.monitor.live import Service, wait_for
from tests.monitor.test_service import Open, curve, lines, story, told

pytestmark = pytest.mark.faults


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def gauge(service: Service, name: str) -> float:
    text = service.ask("/metrics")[1].decode()
    return float(re.findall(rf"^losscast_{name} (\S+)$", text, re.MULTILINE)[0])


def judged_as_told(monitor: Monitor, run: str) -> Any:
    facts = monitor.run(run)
    assert facts is not None
    strip = [
        {k: v for k, v in one.items() if not k.endswith("time")}
        for one in monitor.store.verdicts(facts.run_id)
    ]
    return strip, [
        {k: v for k, v in one.items() if not k.endswith("time")} for one in monitor.store.alerts(facts.run_id)
    ]


def test_killed_again_and_again_the_judge_comes_to_the_same_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "AGAIN_S", (0.05,))
    events = story()
    whole = Open(tmp_path / "whole")
    whole.send(*events)
    want = told(whole)
    whole.close()

    opened = Open(tmp_path / "apart", apart=True)
    judging = opened.monitor.judging
    assert isinstance(judging, Apart)
    cuts = random.Random(3)
    for start in range(0, len(events), 200):
        opened.send(*events[start : start + 200])
        if start % 400 == 0:
            time.sleep(cuts.uniform(0.1, 1.5))
            process, starts = judging._process, judging.starts
            assert process is not None
            process.kill()
            wait_for(lambda starts=starts: judging.starts > starts, 20)
    facts = opened.monitor.run("tale")
    assert facts is not None
    wait_for(lambda: (opened.monitor.judging.last.get(1) or {}).get("step") == facts.step, 60)
    opened.monitor.judging.stop()
    assert opened.monitor.store.lasts()[1][0] == facts.last_ord, "it ended without writing what it knew"
    assert judged_as_told(opened.monitor, "tale") == (want[0], want[1])
    assert opened.client.get("/v1/runs/tale/samples").json()["samples"] == want[2]
    opened.close()


def test_samples_are_taken_while_there_is_no_judge_and_metrics_say_how_late_it_is(tmp_path: Path) -> None:
    with Service(tmp_path / "store") as service:
        assert service.process is not None
        wait_for(lambda: gauge(service, "judge_failing") == 0.0, 20)
        child = children(service.process.popen.pid)[0]
        os.kill(child, signal.SIGSTOP)
        status, text = service.ask("/v1/events", b"".join(lines("a", [*curve(50), math.nan])))
        assert status == 200, text
        found = service.get("/v1/runs/a/samples")["samples"]
        assert len(found) == 51 and found[-1]["expected"] is None
        wait_for(lambda: gauge(service, "judge_lag_seconds") > 3.0, 20)
        os.kill(child, signal.SIGCONT)
        wait_for(lambda: service.get("/v1/runs/a")["state"] == "non_finite", 20)
        wait_for(lambda: gauge(service, "judge_lag_seconds") == 0.0, 20)
        os.kill(child, signal.SIGKILL)
        wait_for(lambda: gauge(service, "judge_failing") == 1.0, 5)
        assert service.ask("/v1/events", b"".join(lines("b", [*curve(50), math.nan])))[0] == 200
        wait_for(lambda: service.get("/v1/runs/b")["state"] == "non_finite", 30)
        wait_for(lambda: gauge(service, "judge_failing") == 0.0, 10)
        service.kill()
        wait_for(lambda: not Path(f"/proc/{child}").exists(), 10)


def test_a_judge_that_hangs_is_killed_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "HUNG_S", 6.0)
    monkeypatch.setattr(apart, "AGAIN_S", (0.05,))
    opened = Open(tmp_path / "store", apart=True)
    try:
        judging = opened.monitor.judging
        assert isinstance(judging, Apart) and judging._process is not None
        wait_for(lambda: judging.failing is None, 20)
        os.kill(judging._process.pid, signal.SIGSTOP)
        opened.send(*lines("a", [*curve(50), math.nan]))
        wait_for(lambda: judging.starts == 2, 30)
        wait_for(lambda: (judging.last.get(1) or {}).get("state") == "non_finite", 20)
    finally:
        opened.close()


def test_when_the_service_dies_the_judge_does_not_outlive_it(tmp_path: Path) -> None:
    with Service(tmp_path / "store") as service:
        assert service.process is not None
        child = children(service.process.popen.pid)[0]
        service.kill()
        wait_for(lambda: not Path(f"/proc/{child}").exists() or _dead(child), 10)


def _dead(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
