"""What a person decides about the infrastructure is checked before Azure is asked. Needs no Pulumi."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.azure.settings import MACHINES, SPOT_QUOTA, WrongSettings, read_settings

ROOT = Path(__file__).parents[2]


def example(**changes: Any) -> dict[str, Any]:
    data = yaml.safe_load((ROOT / "infra/azure/Pulumi.example.yaml").read_text())["config"][
        "losscast-azure:settings"
    ]
    return {**data, **changes}


def test_the_example_is_sound() -> None:
    settings = read_settings(example())
    assert settings.quotas() == {"Standard NDSH100v5 Family vCPUs": 768, SPOT_QUOTA: 768}
    assert settings.dollars_per_hour() == {"gpu_idle": 0, "gpu_full_on_demand": pytest.approx(8 * 98.32)}
    assert settings.infiniband


POOL = {"name": "p", "vm_size": "Standard_ND96isr_H100_v5", "max": 2, "dollars_per_hour": 90}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prefix": "Loss"}, "prefix"),
        ({"prefix": "l" * 13}, "prefix"),
        ({"admin_group": "admins"}, "admin_group"),
        ({"authorized_ips": []}, "authorized_ips"),
        ({"authorized_ips": ["0.0.0.0/0"]}, "is everybody"),
        ({"authorized_ips": ["1.2.3.4.5"]}, "does not appear to be an IPv4"),
        ({"gpu_pools": []}, "gpu_pools"),
        ({"gpu_pools": [{**POOL, "vm_size": "Standard_NC6"}]}, "Use one of"),
        ({"gpu_pools": [{**POOL, "name": "H100"}]}, "name"),
        ({"gpu_pools": [{**POOL, "name": "a" * 13}]}, "name"),
        ({"gpu_pools": [POOL, POOL]}, "names must differ"),
        ({"gpu_pools": [{**POOL, "name": "system"}]}, "none may be `system`"),
        ({"gpu_pools": [{**POOL, "min": 3}]}, "Swap them"),
        ({"gpu_pools": [{**POOL, "spot": True, "min": 1}]}, "Set min to 0"),
        ({"gpu_pools": [{**POOL, "spot_max_price": 5}]}, "set spot to true"),
        ({"gpu_pools": [{**POOL, "maximum": 5}]}, "maximum"),
        ({"gpu_pools": [{**POOL, "dollars_per_hour": 0}]}, "dollars_per_hour"),
        (
            {"gpu_pools": [{k: v for k, v in POOL.items() if k != "dollars_per_hour"}]},
            "gpu_pools.0.dollars_per_hour",
        ),
        ({"system_min": 5}, "Swap them"),
        ({"monthly_budget": 0}, "monthly_budget"),
        ({"budget_emails": ["oncall"]}, "is no address"),
        ({"budget_start": "2026-01-15"}, "budget_start"),
        ({"containers": {"runs": "a", "data": "a"}}, "two that differ"),
        ({"containers": {"runs": "a"}}, "two that differ"),
        ({"charts": {"kueue": "latest"}}, "charts.kueue"),
        ({"unknown": 1}, "unknown"),
        ({"kubernetes_version": "latest"}, "kubernetes_version"),
    ],
)
def test_a_mistake_is_named_by_its_key(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(WrongSettings) as error:
        read_settings(example(**changes))
    assert words in str(error.value)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(WrongSettings) as error:
        read_settings(example(prefix="X", monthly_budget=-1, admin_group="?"))
    assert len(str(error.value).splitlines()) == 4


def test_settings_that_are_no_mapping_are_refused() -> None:
    for data in (None, [], "x"):
        with pytest.raises(WrongSettings):
            read_settings(data)


def test_machines_are_those_that_train() -> None:
    from launcher.runspec.gpus import gpu_named

    for name, machine in MACHINES.items():
        assert (
            name.startswith("Standard_N") and machine.gpus in (1, 2, 8) and gpu_named(machine.gpu) is not None
        )
        assert machine.infiniband == name.startswith("Standard_ND")


def test_importing_infra_stays_light() -> None:
    import subprocess
    import sys

    code = "import sys, infra, infra.azure, infra.azure.settings; print([m for m in sys.modules if m.startswith(('pulumi', 'azure.'))])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
