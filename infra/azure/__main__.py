"""What `pulumi up` runs."""

import pulumi
from pulumi_azure_native import authorization

from infra.azure.program import build
from infra.azure.settings import read_settings

who = authorization.get_client_config()
for name, value in build(
    read_settings(pulumi.Config("losscast-azure").require_object("settings")),
    tenant=who.tenant_id,
    subscription=who.subscription_id,
).items():
    pulumi.export(name, value)
