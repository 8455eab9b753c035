"""P4: five hundred stories of senders, zombies, restarts and full disks, each held against a reference model after every step.

LOSSCAST_FAULTS=long tells twenty thousand, LOSSCAST_STORIES=N so many.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.monitor.test_ingest import Monitored

LONG = os.environ.get("LOSSCAST_FAULTS") == "long"
STORIES = int(os.environ.get("LOSSCAST_STORIES") or (20_000 if LONG else 500))

pytestmark = pytest.mark.faults


class TestMonitoredLong(Monitored.TestCase):  # type: ignore[name-defined]
    settings = settings(
        max_examples=STORIES,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
