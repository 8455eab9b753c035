"""DefaultAzureCredential end to end: workload identity, a token from a stand-in for Entra, Azurite over https."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.azurite import ACCOUNT, Azurite, Entra, needs_azurite

pytestmark = pytest.mark.e2e
needs_azurite()

USE = """
import sys
from launcher.storage.runlog import RunLog
from launcher.storage.store import open_store
try:
    store = open_store(sys.argv[1])
    with RunLog(store, "run-a").take("job") as holding:
        print("attempt", holding.attempt)
except OSError as error:
    print(error, file=sys.stderr)
    sys.exit(getattr(error, "exit_status", 9))
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Azurite, Entra]]:
    with (
        Azurite(tmp_path_factory.mktemp("azurite-tls"), oauth=True) as azurite,
        Entra(azurite.certificate) as entra,
    ):
        azurite.create("runs")
        yield azurite, entra


def use(
    azurite: Azurite, environment: dict[str, str], container: str = "runs"
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("AZURE_")}
    return subprocess.run(
        [sys.executable, "-c", USE, f"az://{ACCOUNT}/{container}/team/run-a"],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).resolve().parents[2],
        env={**clean, "LOSSCAST_AZ_ENDPOINT": azurite.endpoint, **environment},
    )  # fmt: skip


def test_a_pod_with_workload_identity_takes_its_run_without_any_key(service: tuple[Azurite, Entra]) -> None:
    azurite, entra = service
    asked = len(entra.asked)
    done = use(azurite, entra.environment)
    assert (done.returncode, done.stdout) == (0, "attempt 1\n"), done.stderr
    form = entra.asked[asked]
    assert form["client_assertion"] == "a.service.account" and form["client_id"] == Entra.CLIENT
    assert form["scope"] == "https://storage.azure.com/.default"
    assert len(entra.asked) == asked + 1, "one token serves all requests"


def test_an_identity_that_entra_refuses_is_said_in_one_line_with_what_to_do(
    service: tuple[Azurite, Entra],
) -> None:
    azurite, entra = service
    entra.broken = True
    try:
        done = use(azurite, entra.environment)
    finally:
        entra.broken = False
    assert done.returncode == 1 and done.stdout == ""
    (said,) = done.stderr.strip().splitlines()
    assert "AADSTS70021" in said and "check the workload identity" in said and len(said) < 1000


def test_no_identity_at_all_is_said_in_one_line(service: tuple[Azurite, Entra]) -> None:
    azurite, _ = service
    done = use(
        azurite,
        {
            "AZURE_TOKEN_CREDENTIALS": "WorkloadIdentityCredential",
            "REQUESTS_CA_BUNDLE": str(azurite.certificate),
        },
    )
    assert done.returncode == 1
    (said,) = done.stderr.strip().splitlines()
    assert "az://devstoreaccount1/runs/team/run-a/" in said and "az login" in said


def test_a_container_that_is_not_there_is_named(service: tuple[Azurite, Entra]) -> None:
    azurite, entra = service
    done = use(azurite, entra.environment, container="nowhere")
    assert (
        done.returncode == 1 and "/nowhere/" in done.stderr and "there is no such container" in done.stderr
    ), done.stderr
