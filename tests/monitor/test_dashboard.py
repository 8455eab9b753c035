"""The dashboard that is shipped is the one the code makes, and every query in it is PromQL."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from monitor.prometheus.dashboard import STATES, dashboard, render
from monitor.service.states import STATE_OF

SHIPPED = Path(__file__).parents[2] / "k8s" / "dashboard" / "losscast.json"
PREFIX = re.compile(r"\blosscast_[a-z_]+\b")


def panels(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in node["panels"]:
        yield panel
        yield from panels(panel) if panel.get("panels") else ()


def queries() -> list[str]:
    return [target["expr"] for panel in panels(dashboard()) for target in panel.get("targets", [])]


def test_the_shipped_file_is_the_generated_one() -> None:
    assert SHIPPED.read_text() == render(), (
        "python -m monitor.prometheus.dashboard > k8s/dashboard/losscast.json"
    )


def test_panels_have_one_id_each_and_do_not_overlap() -> None:
    every = list(panels(dashboard()))
    assert len({panel["id"] for panel in every}) == len(every)
    taken: set[tuple[int, int]] = set()
    for panel in every:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_panel_uses_the_chosen_datasource_and_says_its_unit() -> None:
    for panel in panels(dashboard()):
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        if panel["type"] in ("timeseries", "stat"):
            assert panel["fieldConfig"]["defaults"]["unit"]


def test_variables_are_the_ones_that_queries_and_links_use() -> None:
    text = json.dumps(dashboard())
    named = {variable["name"] for variable in dashboard()["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", text)) - {"__field", "__value", "__all"}
    assert used <= named
    assert {"datasource", "cluster", "team", "run"} <= named


def test_every_state_of_the_judge_has_a_colour() -> None:
    from typing import get_args

    from monitor.verdict import State

    assert set(STATES) >= set(get_args(State)) | set(STATE_OF.values())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool to parse the queries with")
def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"query:{i}", "expr": expr} for i, expr in enumerate(queries())]
    file = tmp_path / "rules.json"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    answer = subprocess.run(
        ["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=30
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert len(rules) > 15
