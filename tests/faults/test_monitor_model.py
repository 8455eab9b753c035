"""P4: five hundred stories of senders, zombies, restarts and full disks, each held against a reference model after every step."""

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.monitor.test_ingest import Monitored

LONG = os.environ.get("LOSSCAST_FAULTS") == "long"

pytestmark = pytest.mark.faults


class TestMonitoredLong(Monitored.TestCase):  # type: ignore[name-defined]
    settings = settings(
        max_examples=20_000 if LONG else 500,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
