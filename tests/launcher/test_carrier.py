"""What the carrier of checkpoints takes of a host that trains."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from launcher.training import upload

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a thread's own priority is Linux'")


class Upload:
    """A carriage that only looks at the priority of the threads it starts."""

    def __init__(self) -> None:
        self.niceness = list[int]()

    def carry(self, order: dict[str, Any]) -> None:
        with ThreadPoolExecutor(2) as pool:
            looked = pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            self.niceness.append(looked.result())


def test_an_upload_beside_training_gives_way_and_one_that_is_waited_for_does_not() -> None:
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    carriage = Upload()
    for patience_s in (0.0, 900.0, 0.0, 900.0):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(upload._carry, cast(upload.Carriage, carriage), {"patience_s": patience_s}).result()
    assert carriage.niceness == [upload.LEISURE, ours, upload.LEISURE, ours]
    assert os.getpriority(os.PRIO_PROCESS, 0) == ours
