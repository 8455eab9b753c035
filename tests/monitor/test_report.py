"""The demo's report says what happened, whatever it was, and nothing in it can become code."""

import html.parser
import json
import re
import struct
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.web.report import embed, report_html, report_png
from tests.monitor.made_up_runs import report_data

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=1>\"'&<!--\u2028"


class Reader(html.parser.HTMLParser):
    """What a browser would see: every element with its attributes, and the text outside script and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside = ""
        self.data = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else ""
        if dict(attrs).get("id") == "data":
            self.inside = "data"

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "data":
            self.data += data
        elif not self.inside:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def test_the_first_sentence_says_what_was_predicted_and_what_came() -> None:
    text = Reader(report_html(report_data())).text
    assert "predicted to end at 2.1870. It ended at 2.1530." in text
    assert "The prediction was 1.6% too high" in text
    assert "lies inside the predicted 90% interval of 2.1180 to 2.2510" in text


def test_a_miss_is_said_as_plainly_as_a_hit() -> None:
    data = report_data()
    data["target"] |= {"actual": 2.4, "error_percent": 100 * (2.187 / 2.4 - 1), "inside": False}
    data["drills"][0] |= {"called_step": None, "alert": None, "prometheus": {"fired": False, "alerts": []}}
    text = Reader(report_html(data)).text
    assert "The prediction was 8.9% too low" in text and "lies outside" in text
    assert "The judge did not call it." in text and "did not fire in Prometheus" in text


def test_false_alarms_and_late_pages_are_said() -> None:
    data = report_data()
    alert = {
        "alert": "LossOffLine",
        "severity": "warning",
        "step": 700,
        "since_step": 690,
        "value": 2.9,
        "expected": 2.6,
    }
    data["target"]["alerts"] = [alert]
    data["drills"][0] |= {
        "called_step": 1504,
        "severity": "warning",
        "alert": "LossOffLine",
        "paged_step": 1509,
    }
    text = Reader(report_html(data)).text
    assert "On this healthy run it raised one alert." in text
    assert "four steps later, as LossOffLine. Paged at step 1,509, nine steps after the fault." in text


def test_a_target_without_an_end_still_makes_a_report(tmp_path: Path) -> None:
    data = report_data()
    data["target"] |= {"actual": None, "error_percent": None, "inside": False, "curve": None, "samples": []}
    data["law"]["line"] = None
    data |= {"drills": [], "commands": []}
    assert "It has not finished." in Reader(report_html(data)).text
    report_png(data, tmp_path / "empty.png")


def test_the_file_needs_nothing_beside_it() -> None:
    page = report_html(report_data())
    for name, attributes in Reader(page).elements:
        assert name not in ("link", "iframe", "object", "embed", "img")
        assert not {"src", "style"} & attributes.keys()
        assert not any(key.startswith("on") for key in attributes)
    assert "@import" not in page and "url(" not in page
    assert not re.search(r"^\s*(import|export) ", page, flags=re.MULTILINE)


def test_no_name_becomes_markup() -> None:
    clean, hostile = Reader(report_html(report_data())), Reader(report_html(report_data(HOSTILE)))
    assert hostile.elements[1:][0] == clean.elements[1:][0]
    assert [name for name, _ in hostile.elements] == [name for name, _ in clean.elements]
    assert json.loads(hostile.data) == report_data(HOSTILE)


@settings(max_examples=40)
@given(st.recursive(st.text() | st.sampled_from(["</script>", "<!--", "\u2028"]), st.lists, max_leaves=5))
def test_embedded_data_comes_back_and_cannot_leave_its_element(data: Any) -> None:
    text = embed(data)
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == data


def test_non_finite_numbers_travel_as_their_spellings() -> None:
    assert embed([float("nan"), float("inf")]) == '["NaN","Infinity"]'


def test_the_picture_has_the_size_a_page_wants(tmp_path: Path) -> None:
    data = report_data()
    data["drills"][1]["samples"] = [[1, "NaN"], [2, None], [3, "Infinity"]]
    report_png(data, tmp_path / "picture.png")
    head = (tmp_path / "picture.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24]) == (1600, 1000)
