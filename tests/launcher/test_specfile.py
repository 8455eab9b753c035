"""run.yaml, read: every broken spec is answered with the right place, the key, and what to write instead."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import WrongInput
from launcher.runspec.document import parse, read_data
from launcher.runspec.file import read_spec

BROKEN = sorted((Path(__file__).parent / "broken_specs").glob("*.yaml"))
EXPECT = re.compile(r"# expect (\d+):(\d+) ([\w.\[\]<]*): (.+)")


def test_the_corpus_is_all_there() -> None:
    assert len(BROKEN) >= 60


@pytest.mark.parametrize("path", BROKEN, ids=lambda p: p.stem)
def test_a_broken_spec_is_answered_at_the_right_place(path: Path) -> None:
    """The file's own last lines say which line:col, path and words are expected: all of them, and no others."""
    expected = [(int(m[1]), int(m[2]), m[3], m[4]) for m in EXPECT.finditer(path.read_text())]
    with pytest.raises(WrongInput) as error:
        read_spec(path)
    problems = error.value.problems  # type: ignore[attr-defined]
    found = [(p["line"], p["column"], p["path"], p["message"]) for p in problems]
    assert [f[:3] for f in found] == [e[:3] for e in expected], str(error.value)
    for (*_, message), (*_, words) in zip(found, expected, strict=True):
        assert words in message
    first = str(error.value).splitlines()[1]
    assert first.startswith(f"{path}:{found[0][0]}:{found[0][1]} ")


def test_the_excerpt_shows_the_line_and_points_at_the_column() -> None:
    path = next(p for p in BROKEN if p.stem == "schedule-typo")
    with pytest.raises(WrongInput) as error:
        read_spec(path)
    _, _, line, caret = str(error.value).splitlines()
    assert line == "    8 |   schedule: {kind: cosin, warmup_tokens: 1e5, final_lr: 3e-4}"
    assert line[caret.index("^") :].startswith("cosin")


def test_a_file_that_is_not_there_or_no_text_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="there is no such file"):
        read_spec(tmp_path / "none.yaml")
    with pytest.raises(WrongInput, match="is a folder"):
        read_spec(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: gpt\nteam: \xff\n")
    with pytest.raises(WrongInput, match=r"binary\.yaml:2:7 byte 0xff is not UTF-8"):
        read_spec(binary)
    binary.write_bytes(b"name: a\x00b\n")
    with pytest.raises(WrongInput, match=r":1:8 .*control character"):
        read_spec(binary)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e7", 1e7), ("2.5e9", 2.5e9), ("6e-4", 6e-4), ("1E3", 1e3), (".5", 0.5), ("5.", 5.0), ("-3", -3), ("+3", 3),
        ("0o17", 15), ("0x1F", 31), ("017", 17), ("true", True), ("False", False), ("yes", "yes"), ("off", "off"),
        ("null", None), ("~", None), ("1:30", "1:30"), ("1_000", "1_000"), ("2024-01-01", "2024-01-01"), ("'1'", "1"),
        ("!", ""),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    got = parse(f"a: {text}\n", "t").data["a"]
    assert got == value and type(got) is type(value)


def test_a_folder_in_place_of_a_spec_is_answered_with_the_spec_in_it(tmp_path: Path) -> None:
    def said() -> str:
        with pytest.raises(WrongInput) as refused:
            read_spec(tmp_path)
        return str(refused.value)

    assert (
        said() == f"{tmp_path}: is a folder, and a spec is a file. There is no .yaml in it. Give a run.yaml."
    )
    (tmp_path / "other.yaml").touch()
    assert f"Give {tmp_path}/other.yaml." in said()
    (tmp_path / "run.yaml").touch()
    assert f"Give {tmp_path}/run.yaml (of 2 .yaml in it)." in said()
    (tmp_path / "spec.json").touch()
    assert f"`losscast resume {tmp_path}`" in said()


def test_a_deep_or_a_huge_file_is_refused_quickly(tmp_path: Path) -> None:
    deep = tmp_path / "deep.yaml"
    deep.write_text("a: " + "[" * 5000 + "]" * 5000)
    with pytest.raises(WrongInput, match="levels deep"):
        read_spec(deep)
    deep.write_text("a: " + "x" * (1 << 20))
    with pytest.raises(WrongInput, match="at most 1048576"):
        read_spec(deep)


def test_any_yaml_file_is_read_as_plain_data_with_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "ladder.yaml"
    path.write_text("name: l\nrungs:\n  - {workload: {width: 8}}\n")
    assert read_data(path) == {"name": "l", "rungs": [{"workload": {"width": 8}}]}
    path.write_text("name: l\nname: m\n")
    with pytest.raises(WrongInput, match=":2:1 name: is given twice"):
        read_data(path)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="abn:{}[],-&*!|>'\"#%@` \t\n0.e~", max_size=60))
def test_no_text_makes_the_reader_fail_in_another_way(text: str) -> None:
    try:
        document = parse(text, "t")
    except WrongInput:
        return
    for complaint in document.complaints:
        assert document.render(complaint)
