"""Who we are to Azure: one credential for the process, and where an account's blobs are served.

`DefaultAzureCredential` finds the identity by itself: workload identity on the cluster (the service account's projected
token), a managed identity on a virtual machine, `az login` on a person's machine. There is no way to give an account
key or a connection string: a key in a spec would be kept, shared, and able to do everything.

    AZURE_CLIENT_ID, AZURE_TENANT_ID, AZURE_FEDERATED_TOKEN_FILE   set by AKS workload identity
    AZURE_AUTHORITY_HOST                                           another Entra: sovereign clouds, a stand-in
    LOSSCAST_AZ_ENDPOINT    where blobs are served, "{account}" replaced by the account's name; without it
                            https://{account}.blob.core.windows.net
    REQUESTS_CA_BUNDLE      certificates to trust beside a private endpoint

Which role each identity needs is in docs/storage.md.
"""

import os
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from azure.core.credentials import TokenCredential

ENDPOINT_VARIABLE = "LOSSCAST_AZ_ENDPOINT"
PUBLIC_ENDPOINT = "https://{account}.blob.core.windows.net"
KNOWN_AUTHORITIES = frozenset(
    {"login.microsoftonline.com", "login.microsoftonline.us", "login.chinacloudapi.cn", "login.partner.microsoftonline.cn"}
)  # fmt: skip


@cache
def credential() -> "TokenCredential":
    """The identity of this process. It fetches a token when one is first needed, and renews it ahead of its end."""
    from azure.identity import DefaultAzureCredential

    return DefaultAzureCredential(disable_instance_discovery=_private_authority())


def endpoint(account: str) -> str:
    """The URL under which the account's containers are."""
    return (os.environ.get(ENDPOINT_VARIABLE) or PUBLIC_ENDPOINT).replace("{account}", account).rstrip("/")


def _private_authority() -> bool:
    """True where AZURE_AUTHORITY_HOST is none of Microsoft's: then the public directory of authorities, which the
    library would ask, knows nothing of it and may be out of reach."""
    host = os.environ.get("AZURE_AUTHORITY_HOST", "")
    name = urlsplit(host if "://" in host else f"https://{host}").hostname
    return bool(name) and name not in KNOWN_AUTHORITIES
