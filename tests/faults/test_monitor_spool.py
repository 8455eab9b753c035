"""P2 for the spool: bytes cut, flipped and blanked in what waits to be sent. No line leaves that was not put in, in the order
it was put in, and what is lost is counted, to the line where only an end was cut off."""

import os
import random
import shutil
from pathlib import Path

import pytest

from launcher.spool import SEGMENT_LINES, Spool
from monitor.schema import encode_event, sample
from tests.faults.test_monitor_damage import damage

DAMAGES = 4000 if os.environ.get("LOSSCAST_FAULTS") == "long" else 400
LINES = 2 * SEGMENT_LINES + 300

pytestmark = pytest.mark.faults


def drained(folder: Path) -> tuple[list[bytes], int]:
    """All that a later reporter would send, and how many lines it says were damaged."""
    spool = Spool(folder, "a", 2)
    out = []
    while (taken := spool.take()) is not None:
        segment, lines = taken
        out += lines
        spool.drop(segment)
    spool.close()
    return out, spool.damaged


def test_a_damaged_spool_sends_nothing_wrong_and_counts_what_is_lost(tmp_path: Path) -> None:
    put = [
        encode_event(sample("a", 1, s, step=s + 1, loss=3.0 - s / 1e4, time=1e9 + s)) for s in range(LINES)
    ]
    first = Spool(tmp_path / "whole", "a", 1)
    first.append(put)
    first.close()
    shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    assert drained(tmp_path / "copy") == (put, 0)
    rng = random.Random(3)
    place = {line: i for i, line in enumerate(put)}
    counted = cut = 0
    for i in range(DAMAGES):
        folder = tmp_path / "bad"
        shutil.copytree(tmp_path / "whole", folder)
        path = rng.choice(sorted(folder.glob("*/*.seg")))
        size = path.stat().st_size
        what = damage(rng, path)
        if rng.random() < 0.2:  # to the end of a line, where nothing is torn
            content = path.read_bytes()
            path.write_bytes(content[: content.rfind(b"\n", 0, rng.randrange(size)) + 1])
            what += ", then cut at the end of a line"
        got, damaged = drained(folder)
        at = [place[line] for line in got]  # KeyError: a line that nobody put in
        assert at == sorted(set(at)), f"{i}: {what}: out of order, or twice"
        gone = len(put) - len(got)
        assert damaged >= gone, f"{i}: {what}: {gone} lines are gone, and {damaged} are said to be"
        if "flip" not in what and "burst" not in what and "blank" not in what:
            assert damaged == gone, f"{i}: {what}: {gone} lines are gone, and {damaged} are said to be"
            cut += 1
        counted += damaged > 0
        shutil.rmtree(folder)
    print(f"{DAMAGES} damages: {counted} counted, {cut} of them cuts, to the line")
    assert counted > DAMAGES * 3 // 4


def test_what_a_killed_reporter_left_is_whole_and_a_thinned_segment_replaces_what_it_was(
    tmp_path: Path,
) -> None:
    put = [encode_event(sample("a", 1, s, step=s + 1, loss=3.0, time=1e9 + s)) for s in range(300)]
    first = Spool(tmp_path / "spool", "a", 1)
    for start in range(0, 300, 30):
        first.append(put[start : start + 30])
    shutil.copytree(tmp_path / "spool", tmp_path / "killed")  # nothing was closed
    (path,) = (tmp_path / "killed").glob("*/*.seg")
    lines = path.read_bytes().splitlines(keepends=True)
    assert drained(tmp_path / "killed") == (put, 0)
    shutil.copytree(
        tmp_path / "spool", tmp_path / "between"
    )  # killed after it was thinned, before the old one was gone
    (path,) = (tmp_path / "between").glob("*/*.seg")
    path.with_name(path.name.replace("-300", "-150")).write_bytes(b"".join(lines[::2]))
    assert drained(tmp_path / "between") == (put[::2], 0)
    first.close()


def test_what_a_segment_lost_is_counted_once_however_often_it_is_tried(tmp_path: Path) -> None:
    first = Spool(tmp_path, "a", 1)
    first.append([encode_event(sample("a", 1, s, step=s + 1, loss=3.0, time=1e9)) for s in range(10)])
    first.close()
    (path,) = tmp_path.glob("*/*.seg")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:7]))
    spool = Spool(tmp_path, "a", 2)
    assert spool.waiting == 10
    for _ in range(3):
        taken = spool.take()
        assert taken is not None and len(taken[1]) == 7 and spool.damaged == 3
        spool.put_back(taken[0])
    spool.close()
