"""P2 for the spool: bytes cut, flipped and blanked in what waits to be sent. No line leaves that was not put in, in the order
it was put in, and what is lost is counted. One thing can't be seen: whole lines cut off a segment's end."""

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
    counted = cut_clean = 0
    for i in range(DAMAGES):
        folder = tmp_path / "bad"
        shutil.copytree(tmp_path / "whole", folder)
        path = rng.choice(sorted(folder.glob("*/*.seg")))
        size = path.stat().st_size
        what = damage(rng, path)
        left = path.read_bytes()
        clean = len(left) < size and (not left or left.endswith(b"\n"))
        got, damaged = drained(folder)
        at = [place[line] for line in got]  # KeyError: a line that nobody put in
        assert at == sorted(set(at)), f"{i}: {what}: out of order, or twice"
        assert damaged > 0 or clean or got == put, (
            f"{i}: {what}: {len(put) - len(got)} lines are gone, and nothing says so"
        )
        counted += damaged > 0
        cut_clean += clean
        shutil.rmtree(folder)
    print(f"{DAMAGES} damages: {counted} counted, {cut_clean} cut at the end of a line")
    assert counted > DAMAGES * 3 // 4
