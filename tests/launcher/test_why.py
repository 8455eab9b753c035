"""Which resource a pending run lacks, from a picture of its cluster."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.jobs.cluster import Job, Node, Picture, picture_of
from launcher.jobs.why import ago, lacking, unplaced

GPU = {"CPU": 1.0, "GPU": 1.0}


def node(name: str, cpu: float, gpu: float = 0.0, used: Mapping[str, float] | None = None) -> Node:
    return Node(name, {"CPU": cpu, "GPU": gpu} if gpu else {"CPU": cpu}, used or {})


def test_what_the_whole_cluster_lacks_is_named_with_its_amount() -> None:
    reason = lacking([GPU] * 8, Picture(nodes=(node("a", 64, 4),)), None)
    assert reason.facts["missing"] == {"GPU": 4.0} and reason.facts["ever_fits"] is False
    assert reason.headline.startswith(
        "4 GPU missing: the whole cluster has 64 CPU and 4 GPU, place for 4 of 8 ranks"
    )


def test_what_is_busy_is_told_from_what_is_missing_and_by_whom() -> None:
    picture = Picture(
        nodes=(node("a", 8, 4, {"CPU": 4.0, "GPU": 3.0}),),
        jobs=(Job("other-01", "02", "RUNNING", "", "other"), Job("mine-01", "03", "RUNNING", "", "mine")),
        placed={"02": {"CPU": 3.0, "GPU": 3.0}, "03": {}},
    )
    reason = lacking([GPU] * 2, picture, "03")
    assert reason.facts["missing"] == {"GPU": 1.0} and reason.facts["ever_fits"] is True
    assert "1 GPU busy" in reason.headline
    assert "held: 3 CPU and 3 GPU by run other (job other-01)" in reason.evidence


def test_enough_in_all_and_not_together_on_one_machine_is_said() -> None:
    reason = lacking([GPU] * 2, Picture(nodes=(node("cpus", 64), node("gpus", 1, 8))), None)
    assert reason.facts["ever_fits"] is False
    assert "not together on one machine" in reason.headline and "place for 1 of 2 ranks" in reason.headline


def test_a_run_that_has_its_places_waits_for_nothing() -> None:
    picture = Picture(nodes=(node("a", 2, 0, {"CPU": 2.0}),), placed={"03": {"CPU": 2.0}})
    reason = lacking([{"CPU": 1.0}] * 2, picture, "03")
    assert reason.facts["missing"] == {} and "have their places (2 CPU)" in reason.headline


def test_the_autoscalers_words_are_passed_on() -> None:
    status = {
        "clusterStatus": {
            "autoscalerReport": {
                "pendingLaunches": {"gpu-workers": 2},
                "failedNodes": [["10.0.0.9", "gpu-workers"]],
                "nodeAvailabilitySummary": {
                    "nodeAvailabilities": {
                        "a100": {
                            "unavailableNodeInformation": {
                                "category": "Quota",
                                "description": "no cores left",
                            }
                        }
                    }
                },
            }
        }
    }
    reason = lacking([GPU], picture_of((), status, [], []), None)
    words = " ".join(reason.evidence)
    assert "launching 2 x gpu-workers" in words and "a100 can't be had: Quota no cores left" in words
    assert "no node that is alive" in words


def test_a_dashboards_answers_become_one_picture() -> None:
    """Shapes as Ray 2.60 gives them."""
    groups: list[dict[str, Any]] = [
        {"creator_job_id": "02", "state": "CREATED", "bundles": [{"unit_resources": {"CPU": 1.0}}] * 2},
        {
            "creator_job_id": "03",
            "state": "PENDING",
            "bundles": [{"unit_resources": {"CPU": 1.0}}] * 4,
            "stats": {"scheduling_state": "NO_RESOURCES"},
        },
        {"creator_job_id": "01", "state": "REMOVED", "bundles": [{"unit_resources": {"CPU": 9.0}}]},
    ]
    nodes = [
        {"node_id": "n1", "node_name": "a", "state": "ALIVE", "resources_total": {"CPU": 2.0}},
        {"node_id": "n2", "node_name": "b", "state": "DEAD", "resources_total": {"CPU": 64.0}},
    ]
    status = {"clusterStatus": {"loadMetricsReport": {"usageByNode": {"n1": {"CPU": [2.0, 2.0]}}}}}
    picture = picture_of((), status, groups, nodes)
    assert [n.name for n in picture.nodes] == ["a"] and picture.nodes[0].free("CPU") == 0
    assert picture.placed == {"02": {"CPU": 2.0}}
    assert len(picture.waiting) == 1 and len(picture.waiting[0].bundles) == 4


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), max_size=5),
    st.integers(0, 12),
    st.sampled_from([0, 1]),
)
def test_ranks_are_placed_as_many_as_there_is_room_for(
    rooms: list[tuple[int, int]], ranks: int, gpu: int
) -> None:
    bundle = {"CPU": 1.0, "GPU": 1.0} if gpu else {"CPU": 1.0}
    room = [{"CPU": float(c), "GPU": float(g)} for c, g in rooms]
    places = sum(min(c, g) if gpu else c for c, g in rooms)
    assert len(unplaced([bundle] * ranks, room)) == max(0, ranks - places)
    assert room == [{"CPU": float(c), "GPU": float(g)} for c, g in rooms]


@pytest.mark.parametrize(
    ("seconds", "words"), [(-3, "0 s"), (59, "59 s"), (600, "10 min"), (7300, "2 h"), (200_000, "2 days")]
)
def test_spans_are_told_in_the_unit_that_suits(seconds: float, words: str) -> None:
    assert ago(seconds) == words
