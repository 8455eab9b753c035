"""What can't be written is told in words: what, where, why, what instead, whatever the command."""

import errno
import os
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.errors import Failed as LauncherFailed
from launcher.storage.export import _refused
from monitor import schema
from monitor.errors import Failed, WrongInput, some, unwritable, writing
from monitor.store.ingest import Ingest
from monitor.store.store import Store
from monitor.wire import parse

NOWHERE = "/proc"
"""A folder that takes no new file, whoever asks."""
POINTS = "run,params,tokens,loss\n" + "".join(
    f"r{i},{n:.0f},{20 * n:.0f},{1.7 + 400 / n**0.34 + 410 / (20 * n) ** 0.28:.5f}\n"
    for i, n in enumerate(10.0 ** (4 + k / 4) for k in range(8))
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writing")
    made = Ingest(Store(folder / "store"))
    made.start()
    lines = [schema.encode_event(schema.run_started("r", 1, time=1.0))]
    lines += [
        schema.encode_event(schema.sample("r", 1, i, step=i + 1, loss=2.0, time=2.0 + i)) for i in range(5)
    ]
    made.submit(parse(b"".join(lines))).result(10)
    made.stop()
    made.store.close()
    (folder / "points.csv").write_text(POINTS)
    (folder / "file").write_text("mine")
    return folder


CASES = (
    (f"data prepare points.csv --format text -o {NOWHERE}/foo", 1, "/proc/foo can't be written: /proc takes no new file. Give -o a new"),
    (f"fit points.csv --plot {NOWHERE}/p.png", 1, "/proc/p.png can't be written: /proc takes no new file. Give --plot"),
    ("fit points.csv -o store", 2, "store can't be written: it is a folder. Give -o"),
    (f"fit points.csv -o {NOWHERE}/law.json", 1, "/proc/law.json can't be written: /proc takes no new file. Give -o"),
    (f"monitor export r --store store -o {NOWHERE}/e.csv", 1, "/proc/e.csv can't be written: /proc takes no new file. Give -o"),
    (f"monitor export r --store store -o {NOWHERE}/e.parquet", 1, "/proc/e.parquet can't be written: /proc takes no new file. Give -o"),
    ("monitor export r --store store -o nope/e.csv", 2, "nope/e.csv can't be written: there is no folder nope. Give -o"),
    (f"monitor backup --store store {NOWHERE}/bk", 1, "/proc/bk can't be written: /proc takes no new file. Give a file"),
    ("monitor token create --store file", 2, "file can't be written: it is a file, not a folder. Give --store"),
    ("monitor serve --listen 127.0.0.1:0 --store file", 2, "file can't be written: it is a file, not a folder. Give --store"),
    ("monitor restore points.csv --store file", 1, "points.csv: damaged"),
)  # fmt: skip


@pytest.mark.parametrize(("command", "status", "said"), CASES)
def test_what_cant_be_written_is_told_with_why_and_what_instead(
    stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, status: int, said: str
) -> None:  # fmt: skip
    if not os.access(NOWHERE, os.X_OK):
        pytest.skip("needs /proc")
    monkeypatch.chdir(stored)
    assert main(command.split()) == status
    told = capsys.readouterr().err
    assert said in told and "Errno" not in told and "Traceback" not in told


def test_an_export_that_fails_leaves_the_file_as_it_was(
    stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stored / "old.csv"
    before.write_text("step,loss\n")
    assert main(["monitor", "export", "nosuch", "--store", str(stored / "store"), "-o", str(before)]) == 2
    assert before.read_text() == "step,loss\n" and not list(stored.glob(".old.csv*"))


def test_a_list_that_is_cut_says_how_many_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert some("abc", 3) == "a, b, c" and some("abcd", 3) == "a, b, c ... and 1 more" and some([]) == ""
    wide = tmp_path / "wide.csv"
    wide.write_text(",".join(f"c{i}" for i in range(14)) + "\n" + ",".join("1" * 14) + "\n")
    for flags, said in (
        ([], "c8, c9 ... and 4 more. Rename"),
        (["--columns", "loss=zz"], "c8, c9 ... and 4 more"),
        (["--where", "zz=1"], "c8, c9 ... and 4 more"),
    ):
        assert main(["fit", str(wide), *flags]) == 2
        assert said in capsys.readouterr().err


def test_a_full_disk_is_a_failure_and_another_files_error_is_not_ours(tmp_path: Path) -> None:
    with (
        pytest.raises(Failed, match=r"w can't be written: No space left on device\. Make room"),
        writing(tmp_path / "w"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    for other in (
        OSError(errno.EACCES, "no", str(tmp_path / "input")),
        ConnectionRefusedError(111, "refused"),
    ):
        with pytest.raises(type(other)), writing(tmp_path / "w"):
            raise other
    assert isinstance(unwritable(tmp_path / "no" / "w", OSError(errno.ENOENT, "no")), WrongInput)


def test_what_safetensors_says_of_the_disk_is_the_disks_word() -> None:
    torch, safetensors = pytest.importorskip("safetensors.torch"), pytest.importorskip("safetensors")
    target = Path(NOWHERE) / "w.st"
    with pytest.raises(safetensors.SafetensorError) as met:
        torch.save_file({}, target)
    for error, said in (
        (met.value, "takes no new file"),
        (RuntimeError("at all (os error 28)"), "No space left"),
    ):
        with pytest.raises(Failed, match=f"/proc/w.st can't be written: .*{said}"), writing(target):
            raise _refused(error, target)
    assert isinstance(_refused(RuntimeError("no header"), target), LauncherFailed)


def test_a_folder_that_is_made_for_a_law_is_told(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law = tmp_path / "lwas" / "law.json"
    assert main(["fit", str(stored / "points.csv"), "-o", str(law)]) == 0
    assert f"made the folder {law.parent}" in capsys.readouterr().err
    assert main(["fit", str(stored / "points.csv"), "-o", str(law)]) == 0
    assert "made the folder" not in capsys.readouterr().err


def test_a_file_that_is_not_there_is_told_with_what_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "points.csv").write_text("run,params,tokens,loss\n")
    (tmp_path / "law.json").write_text("{}")
    for command, said in (
        (["fit", "ponts.csv"], f"no such file in {tmp_path}; did you mean points.csv?"),
        (["replay", "x.csv"], "it has points.csv"),
        (["import", "y.csv", "--dry-run"], "it has points.csv"),
        (["predict", "lw.json", "--params", "1e6", "--tokens", "1e8"], "did you mean law.json?"),
        (["fit", "away/points.csv"], f"there is no folder away, seen from {tmp_path}"),
        (["validate", "run.yaml"], f"There is no .yaml in it. Give a run.yaml. That folder is {tmp_path}."),
        (["monitor", "token", "list", "--store", "nope"], "nope: no such store"),
        (["data", "show", "points.csv"], "it is a file"),
    ):
        assert main(command) == 2, command
        assert said in capsys.readouterr().err, command
