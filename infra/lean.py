"""A block read, and a blob written whole, with one request each and no more of the SDK around it than its own pipeline.

For a small file most of what the SDK does is not about the file: a client for each blob, a downloader, forty headers told
apart. Here the request goes straight through the pipeline of the SDK's container client, so that identity, proxies and
certificates are the SDK's, and the bytes are taken from the connection in one piece. An answer that is not plainly the one
asked for is no business of this file: the caller asks again through the SDK, which has words for each.
"""

import contextlib
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from azure.core.exceptions import HttpResponseError, ResourceNotFoundError, ServiceResponseError
from azure.core.rest import HttpRequest
from azure.storage.blob import ContainerClient
from urllib3.exceptions import HTTPError

from infra.tries import PASSING, Timeouts


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a blob, and what their answer says of the whole."""

    data: bytes
    size: int
    """Of the whole blob."""
    etag: str | None


class Lean:
    """Requests on the blobs of one container."""

    def __init__(self, client: ContainerClient) -> None:
        self._pipeline: Any = client._pipeline
        self._url, self._version = client.url.partition("?")[0], client.api_version

    def read(self, name: str, offset: int, length: int, timeouts: Timeouts) -> Part | None:
        """`length` bytes from `offset` on, fewer at the blob's end. None: ask the SDK. Raises AzureError."""
        asked = {"x-ms-range": f"bytes={offset}-{offset + length - 1}"}
        response = self._send("GET", name, asked, None, timeouts)
        if response.status_code != 206:
            return _let_go(response)
        said = response.headers.get("Content-Range", "").rpartition("/")[2]
        try:
            data = response.internal_response.raw.read(decode_content=False)
        except (HTTPError, OSError) as error:  # cut off, or too late
            response.close()
            raise ServiceResponseError(error, error=error) from error
        if not said.isdigit() or len(data) != min(length, int(said) - offset):
            raise ServiceResponseError(
                f"{len(data)} bytes of {length} at {offset} came, of a blob of {said or '?'}"
            )
        return Part(data, int(said), response.headers.get("ETag"))

    def write(self, name: str, data: bytes, timeouts: Timeouts) -> bool:
        """Create or replace a blob in one request. False: ask the SDK. Raises AzureError."""
        about = {
            "x-ms-blob-type": "BlockBlob",
            "Content-Type": "application/octet-stream",
            "Content-Length": str(len(data)),
        }
        response = self._send("PUT", name, about, data, timeouts)
        if response.status_code != 201:
            _let_go(response)
            return False
        with contextlib.suppress(HTTPError, OSError):  # nothing: so that the connection serves the next
            response.internal_response.raw.read()
        return True

    def _send(
        self, method: str, name: str, headers: dict[str, str], data: bytes | None, timeouts: Timeouts
    ) -> Any:
        url = f"{self._url}/{quote(name, safe='~/')}"
        request = HttpRequest(method, url, headers={"x-ms-version": self._version, **headers}, content=data)
        return self._pipeline.run(request, stream=True, **timeouts).http_response


def _let_go(response: Any) -> None:
    """Drop an answer that is not the one asked for. Raises what needs no second question: no such blob, and what may pass."""
    status, code = response.status_code, response.headers.get("x-ms-error-code")
    response.close()
    kind = (
        ResourceNotFoundError if code == "BlobNotFound" else HttpResponseError if status in PASSING else None
    )
    if kind is not None:
        error = kind(str(code or response.reason))
        error.status_code, error.error_code = status, code  # pyright: ignore[reportAttributeAccessIssue]
        raise error
