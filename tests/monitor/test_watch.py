"""The terminal view fits its terminal, tells the truth first, and sends it no commands."""

import argparse
import contextlib
import json
import os
import pty
import re
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from hypothesis import example, given, settings
from hypothesis import strategies as st

from monitor.cli import runs as listing
from monitor.cli.watch import register, watch
from monitor.errors import Failed, WrongInput
from monitor.web.braille import fit, plot, width_of
from monitor.web.terminal import run_frame, runs_frame
from tests.monitor import page_stub

RUNS = page_stub.made_up()
COLOR = re.compile(r"\x1b\[\d+m")


def details(runs: dict[str, dict[str, Any]] = RUNS) -> list[dict[str, Any]]:
    return [held["detail"] for held in runs.values()]


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (132, 50), (60, 12)])
def test_every_frame_fits_its_terminal(width: int, height: int, color: bool) -> None:
    frames = [runs_frame(details(), width=width, height=height, color=color)]
    frames += [
        run_frame(held["detail"], held["samples"], width=width, height=height, color=color)
        for held in RUNS.values()
    ]
    for lines in frames:
        assert len(lines) <= height
        assert all(width_of(COLOR.sub("", line)) <= width for line in lines)


def test_what_needs_a_person_comes_first() -> None:
    lines = runs_frame(details())
    rows = [line for line in lines if any(name in line for name in RUNS)]
    assert {rows[0].split()[0], rows[1].split()[0]} == {"!"}
    assert "resumed" in rows[2] and "ended" in rows[-1]
    assert any("not a number" in row and "NaN" in row for row in rows[:2])


def test_a_run_shows_its_loss_its_band_and_its_alerts() -> None:
    held = RUNS["gpt-71k-lr-x30"]
    text = "\n".join(run_frame(held["detail"], held["samples"]))
    assert "3.7273" in text and "ends at 2.1180 (2.0600 to 2.1900)" in text
    assert "LossDiverged" in text and "step 1,509, since 1,501" in text
    assert any(0x2800 < ord(c) < 0x2900 for c in text) and "\N{MIDDLE DOT}" in text


def test_a_run_that_has_ended_shows_what_it_ended_at_and_is_not_told_to_go_on() -> None:
    held = RUNS["gpt-28k-ladder"]
    ended = held["detail"] | {
        "loss": 2.4321,
        "end_reason": "finished",
        "predicted_final": {"p05": 2.2, "p50": 2.25, "p95": 2.3},
        "advice": {
            "action": "continue",
            "p_miss": 0.4,
            "evidence": ["heading for 2.2600 nats per token"],
            "final_loss": {"p05": 2.2, "p50": 2.26, "p95": 2.3},
        },
    }
    row = next(line for line in runs_frame([ended]) if "gpt-28k-ladder" in line)
    assert row.count("2.4321") == 2 and "2.25" not in row and "continue" not in row and "40%" not in row
    text = "\n".join(run_frame(ended, held["samples"]))
    assert "ended at 2.4321" in text and "predicted 2.2500" in text and "the run has ended: finished" in text
    assert "heading for" not in text and "continue" not in text


def test_a_diverged_run_is_not_shown_to_end_where_its_prediction_does() -> None:
    run = RUNS["gpt-71k-lr-x30"]["detail"] | {"predicted_final": {"p05": 2.0, "p50": 2.118, "p95": 2.2}}
    far = {"p05": 3.6, "p50": 3.7111, "p95": 3.8}
    for final, shown in ((far, "3.7111"), (None, "\N{EN DASH}")):
        advice = {"action": "roll_back", "p_miss": None, "evidence": [], "final_loss": final}
        row = next(line for line in runs_frame([run | {"advice": advice}]) if "gpt-71k-lr-x30" in line)
        assert shown in row and "2.1180" not in row


def test_the_advice_is_told_whole_and_other_parts_give_way() -> None:
    """The runbooks send people here to read which data to skip."""
    held = RUNS["gpt-71k-lr-x30"]
    evidence = [f"step {n}: what the judge saw of it, in figures that matter" for n in range(9)]
    advice = {
        "action": "roll_back",
        "p_miss": 0.4,
        "evidence": [*evidence, "skip the data of steps 302 to 318"],
    }
    alert = (held["detail"]["alerts"] or [{}])[0]
    run = held["detail"] | {"advice": advice, "alerts": [alert] * 6}
    for height, drawn in ((24, True), (12, False)):
        lines = run_frame(run, held["samples"], width=80, height=height)
        assert len(lines) <= height and all(width_of(line) <= 80 for line in lines)
        told = " ".join(" ".join(lines).split())
        assert "skip the data of steps 302 to 318" in told and "..." not in told
        assert "more" in lines[-1] and drawn == any(0x2800 < ord(c) < 0x2900 for c in told)
    cut = run_frame(
        run | {"advice": advice | {"evidence": evidence * 9}}, held["samples"], width=80, height=24
    )
    assert len(cut) == 24 and cut[-1].endswith("...")


def test_a_loss_that_is_no_number_is_a_cross() -> None:
    held = RUNS["gpt-71k-nan"]
    lines = run_frame(held["detail"], held["samples"])
    axis = next(i for i, line in enumerate(lines) if line.lstrip().startswith("step 0"))
    assert "x" in lines[axis - 1]


@given(st.text(max_size=30))
@settings(max_examples=60)
def test_no_name_commands_the_terminal(name: str) -> None:
    hostile = f"\x1b]0;owned\x07\x9b2J{name}\r\n"
    alert = {
        "alert": hostile,
        "severity": "critical",
        "step": 3,
        "since_step": 2,
        "value": 1.0,
        "expected": None,
    }
    run = {
        "run": hostile, "team": hostile, "state": hostile, "phase": hostile, "step": 3, "loss": hostile,
        "advice": {"action": hostile, "p_miss": 0.5, "evidence": [hostile]}, "alerts": [alert], "attempt": 1,
    }  # fmt: skip
    for line in [
        *runs_frame([run]),
        *run_frame(run, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": hostile}]),
    ]:
        assert not any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") for c in line)
        assert width_of(line) <= 80


@given(st.text(), st.integers(0, 40))
def test_fit_is_exact(text: str, width: int) -> None:
    assert width_of(fit(text, width)) == width


@example([0.0, 1.7887271029470854e308])
@given(st.lists(st.floats() | st.none() | st.sampled_from(["NaN", "Infinity"]), max_size=40))
@settings(max_examples=60)
def test_any_losses_can_be_drawn(losses: list[Any]) -> None:
    samples = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    lines = plot(None, samples, width=60, height=12, color=False)
    assert len(lines) <= 12 and all(width_of(line) <= 60 for line in lines)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(page_stub.app(RUNS), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(5)


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    return watch(parser.parse_args(["watch", *words]))


def test_once_prints_a_frame_and_its_status_says_what_stands(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOSSCAST_TOKEN", page_stub.TOKEN)
    assert run("--url", url, "--once") == 0
    assert "gpt-71k-target" in capsys.readouterr().out
    assert run("gpt-71k-target", "--url", url, "--once") == 0
    assert run("gpt-71k-lr-x30", "--url", url, "--once") == 3
    assert "\x1b" not in capsys.readouterr().out


def test_the_live_view_leaves_the_terminal_as_it_found_it(url: str) -> None:
    ours, theirs = pty.openpty()
    command = "import sys; from launcher.cli import main; sys.exit(main())"
    environment = {**os.environ, "LOSSCAST_TOKEN": page_stub.TOKEN, "LOSSCAST_URL": url, "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-c", command, "watch", "gpt-71k-target", "--every", "0.2"],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
    ) as process:  # fmt: skip
        os.close(theirs)
        seen = b""
        while b"on its line" not in seen and process.poll() is None:
            seen += os.read(ours, 65536)
        os.write(ours, b"q")
        with contextlib.suppress(OSError):  # the other end closes when the process ends
            while chunk := os.read(ours, 65536):
                seen += chunk
        assert process.wait(10) == 0
    os.close(ours)
    assert seen.startswith(b"\x1b[?1049h\x1b[?25l") and seen.endswith(b"\x1b[?25h\x1b[?1049l")


def test_what_is_wrong_is_said_with_what_to_do(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOSSCAST_TOKEN", raising=False)
    with pytest.raises(WrongInput, match="wants a token"):
        run("--url", url, "--once")
    monkeypatch.setenv("LOSSCAST_TOKEN", "wrong")
    with pytest.raises(WrongInput, match="token create"):
        run("--url", url, "--once")
    monkeypatch.setenv("LOSSCAST_TOKEN", page_stub.TOKEN)
    with pytest.raises(WrongInput, match="no run nothing-here; `losscast runs` lists them"):
        run("nothing-here", "--url", url, "--once")
    with pytest.raises(WrongInput, match="no run's name"):
        run("../etc", "--url", url, "--once")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(Failed, match="no monitor answers"):
        run("--url", f"http://127.0.0.1:{port}", "--once")
    with pytest.raises(WrongInput, match="--once"):
        run("--url", url)


@pytest.mark.parametrize(
    "bad",
    [
        "http://127.0.0.1:87oo",
        "http://",
        "http://[::1",
        "http://a b:80",
        "http://me:pw@h:80",
        "ftp://h",
        "http://h:99999",
    ],
)
def test_an_address_that_is_none_is_wrong_input(bad: str) -> None:
    with pytest.raises(WrongInput, match="give --url http://HOST:PORT"):
        run("--url", bad, "--once")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", Failed),
        (b"", Failed),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"runs": [', Failed),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", Failed),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>", Failed),
        (b"HTTP/1.1 409 Conflict\r\nContent-Length: 6\r\n\r\n<html>", WrongInput),
        (b"HTTP/1.1 422 No\r\nContent-Length: 2\r\n\r\n[]", WrongInput),
        (b"HTTP/1.1 422 No\r\nContent-Length: 90\r\n\r\n{}", WrongInput),
    ],
)
def test_an_answer_that_is_no_monitor_s_or_breaks_off_ends_in_words(
    answer: bytes, error: type[Exception]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def once() -> None:
            asked, _ = server.accept()
            with asked:
                asked.recv(65536)
                asked.sendall(answer)

        threading.Thread(target=once, daemon=True).start()
        with pytest.raises(error, match=r"127\.0\.0\.1"):
            run("--url", f"http://127.0.0.1:{server.getsockname()[1]}", "--once")


def test_the_list_of_runs_goes_to_a_person_or_to_a_program(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOSSCAST_TOKEN", page_stub.TOKEN)
    monkeypatch.setenv("COLUMNS", "100")  # in eighty a long name is cut
    parser = argparse.ArgumentParser()
    listing.register(parser.add_subparsers())

    def say(*words: str) -> str:
        assert listing.runs(parser.parse_args(["runs", "--url", url, *words])) == 0
        return capsys.readouterr().out

    assert all(name in say() for name in RUNS)
    found = json.loads(say("--json"))["runs"]
    assert {r["run"] for r in found} == set(RUNS) and found[0]["state"] in ("diverged", "non_finite")
    assert [r["run"] for r in json.loads(say("--json", "--find", "LADDER"))["runs"]] == ["gpt-28k-ladder"]
    assert {r["state"] for r in json.loads(say("--json", "--alerts"))["runs"]}.isdisjoint({"healthy"})
    assert say("--find", "nothing-of-the-sort") == ""


@pytest.mark.parametrize("given", ["lct_abcdefgh", "lct_abc-def", "a b", ""])
def test_a_token_given_where_a_variable_belongs_is_not_repeated(given: str) -> None:
    with pytest.raises(WrongInput, match="name of a variable") as said:
        run("--token-env", given, "--once")
    assert "abc" not in str(said.value)


def test_after_an_outage_a_lost_loss_stands_before_the_runs_that_stand_still() -> None:
    still = [
        {**details()[0], "run": f"still-{k}", "state": "stalled", "phase": "running", "last_time": 2e9}
        for k in range(30)
    ]
    lost = {**details()[0], "run": "lost", "state": "non_finite", "phase": "running", "last_time": 1e9}
    assert " lost " in runs_frame([*still, lost])[3]
