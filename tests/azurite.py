"""A real Azurite for tests, with or without TLS and OAuth, and a stand-in for Entra that hands out tokens for it.

    with Azurite(folder) as azurite: azurite.store("container", "prefix")       http, Azurite's published key
    with Azurite(folder, oauth=True) as azurite, Entra(...) ...                 https, DefaultAzureCredential

Needs `azurite-blob` on the PATH: npm install -g azurite.
"""

import base64
import ctypes
import datetime
import http.server
import ipaddress
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.ports import free_port

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Published with Azurite: it opens nothing else."""
ABSENT = "no azurite-blob here: npm install -g azurite"


def needs_azurite() -> None:
    """Skip the calling test, or module, where Azurite is not installed."""
    pytest.importorskip("azure.storage.blob", reason="needs azure: pip install 'losscast[azure]'")
    if shutil.which("azurite-blob") is None:
        pytest.skip(ABSENT, allow_module_level=True)


_prctl = getattr(
    ctypes.CDLL(None), "prctl", None
)  # looked up here: between fork and exec there is no time for it
PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In the child: end when the thread that started it does, be it by SIGKILL. Linux; elsewhere it does nothing."""
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Azurite:
    """A blob service of our own on a port of its own."""

    def __init__(self, folder: Path, oauth: bool = False) -> None:
        self.folder, self.port, self.oauth = folder, free_port(), oauth
        self.certificate = folder / "cert.pem"

    @property
    def url(self) -> str:
        """Of the account."""
        return f"{'https' if self.oauth else 'http'}://127.0.0.1:{self.port}/{ACCOUNT}"

    @property
    def endpoint(self) -> str:
        """For LOSSCAST_AZ_ENDPOINT."""
        return self.url.replace(ACCOUNT, "{account}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> "Azurite":
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            "azurite-blob", "--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", str(self.folder / "data"),
            "--silent", "--disableTelemetry", "--skipApiVersionCheck",
        ]  # fmt: skip
        if self.oauth:
            key = make_certificate(self.certificate)
            command += ["--oauth", "basic", "--cert", str(self.certificate), "--key", str(key)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=_end_with_parent
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("azurite-blob did not start") from None
                time.sleep(0.1)

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def create(self, container: str) -> None:
        from azure.core.exceptions import ResourceExistsError
        from azure.storage.blob import ContainerClient

        client = ContainerClient(
            self.url,
            container,
            credential=KEY,
            connection_verify=str(self.certificate) if self.oauth else True,
        )
        try:
            client.create_container()
        except ResourceExistsError:
            pass
        finally:
            client.close()

    def store(self, container: str, prefix: str, url: str | None = None, **more: Any) -> Any:
        """A BlobStore on it, by key; `url` when a proxy lies between."""
        from infra.blob import BlobStore

        assert not self.oauth, "by key on plain http only"
        return BlobStore(url or self.url, container, prefix, KEY, **more)


def make_certificate(path: Path) -> Path:
    """A self-signed certificate of 127.0.0.1; returns the file of its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "losscast test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret = path.with_suffix(".key")
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return secret


class Entra:
    """What workload identity talks to: trades the federated token of a service account for one that Azurite takes."""

    TENANT, CLIENT = "11111111-2222-3333-4444-555555555555", "66666666-7777-8888-9999-000000000000"

    def __init__(self, certificate: Path) -> None:
        self.certificate = certificate
        self.asked: list[dict[str, str]] = []
        self.broken = False

    @property
    def environment(self) -> dict[str, str]:
        """What AKS puts into a pod, and where this stand-in is."""
        federated = self.certificate.with_name("federated-token")
        federated.write_text("a.service.account")
        return {
            "AZURE_AUTHORITY_HOST": f"https://127.0.0.1:{self.port}",
            "AZURE_FEDERATED_TOKEN_FILE": str(federated),
            "AZURE_TENANT_ID": self.TENANT,
            "AZURE_CLIENT_ID": self.CLIENT,
            "AZURE_TOKEN_CREDENTIALS": "prod",
            "REQUESTS_CA_BUNDLE": str(self.certificate),
        }

    def __enter__(self) -> "Entra":
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def answer(self, body: dict[str, Any], status: int = 200) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                base = f"https://127.0.0.1:{outer.port}/{outer.TENANT}"
                self.answer(
                    {
                        "issuer": f"{base}/v2.0",
                        "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                        "token_endpoint": f"{base}/oauth2/v2.0/token",
                    }
                )

            def do_POST(self) -> None:
                from urllib.parse import parse_qsl

                form = dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
                outer.asked.append(form)
                if outer.broken:
                    return self.answer(
                        {
                            "error": "invalid_client",
                            "error_description": "AADSTS70021: no matching federated identity record",
                        },
                        401,
                    )
                return self.answer(
                    {"token_type": "Bearer", "expires_in": 3600, "access_token": outer.token()}
                )

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.certificate.with_suffix(".key"))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def token(self) -> str:
        now = int(time.time())
        claims = {
            "aud": "https://storage.azure.com",
            "iss": f"https://sts.windows.net/{self.TENANT}/",
            "iat": now - 60,
            "nbf": now - 60,
            "exp": now + 3600,
            "oid": self.CLIENT,
        }
        parts = ({"alg": "RS256", "typ": "JWT"}, claims)
        head = ".".join(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts)
        return f"{head}.{base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip('=')}"
