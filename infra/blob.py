"""A run's log and checkpoints on Azure Blob: `infra.objects.Store` over azure-storage-blob.

    az://account/container/prefix

`put_new` is one PUT with If-None-Match, so the service decides races. A conflict, like an answer that never came, says
nothing about who wrote: the blob is read back, and one's own bytes (entries carry a nonce) are success.

Files move in blocks, many at a time (`infra.moving`).

Each request is tried again after errors that pass (no answer, 408, 429, 5xx, a body cut short) until `limit_s` of the
operation, or of the block, is over: then TooLate, which leaves the outcome open. Other failures are OSError at once, and
all are one line (`infra.tries`).

Needs a container that exists. Versioning and soft delete of blobs may be on: neither changes what is read here.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from azure.core.exceptions import AzureError, HttpResponseError, ResourceExistsError, ResourceModifiedError
from azure.core.pipeline.transport import RequestsTransport
from azure.storage.blob import BlobBlock, BlobClient, ContainerClient
from requests import Session
from requests.adapters import HTTPAdapter

from infra import moving
from infra.lean import Lean, Part
from infra.moving import BLOCK_BYTES, MAX_BLOCKS
from infra.objects import Exists, Item, Missing, Progress, check_key, quiet
from infra.tries import Conflict, Refused, T, Timeouts, tried

THREADS = 16
LIMIT_S = 120.0
LIMIT_VARIABLE = "LOSSCAST_AZ_LIMIT_S"


class BlobStore:
    """A store under one prefix of a container. Safe to use from many threads, not across a fork."""

    def __init__(
        self,
        account_url: str,
        container: str,
        prefix: str = "",
        credential: Any = None,
        *,
        limit_s: float = LIMIT_S,
        threads: int = THREADS,
        transport: Any = None,
    ) -> None:
        """account_url  where the account's containers are, e.g. https://account.blob.core.windows.net
        credential   a TokenCredential; `infra.identity.credential()` by default
        limit_s      seconds an operation, or a block of a transfer, may take with all its tries
        transport    what requests go through; a fresh pool of connections by default
        """
        if credential is None:
            from infra.identity import credential as own

            credential = own()
        self.account_url, self.container_name = account_url, container
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.limit_s, self.threads = limit_s, threads
        self._client = ContainerClient(
            account_url, container, credential=credential, retry_total=0, retry_connect=0, retry_read=0, retry_status=0,
            transport=transport or _connections(threads), max_single_put_size=MAX_BLOCKS * BLOCK_BYTES,
            max_single_get_size=BLOCK_BYTES, max_chunk_get_size=BLOCK_BYTES,
        )  # fmt: skip
        self._lean = Lean(self._client)

    def put_new(self, key: str, data: bytes) -> None:
        blob, stumbled = self._blob(key), False

        def once(timeouts: Timeouts) -> None:
            nonlocal stumbled
            try:
                blob.upload_blob(data, overwrite=False, max_concurrency=1, **timeouts)
            except (ResourceExistsError, ResourceModifiedError):
                raise
            except AzureError:
                stumbled = True  # it may have got through
                raise

        deadline = time.monotonic() + self.limit_s
        while True:
            try:
                return tried(f"create {self.where(key)}", once, limit_s=self.limit_s, deadline=deadline)
            except Conflict:
                try:
                    if self.get(key) == data and stumbled:
                        return None  # ours: an earlier try got through
                    raise Exists(key)
                except Missing:  # a conflict about nothing
                    if time.monotonic() > deadline:
                        raise Refused(
                            errno.EAGAIN, f"create {self.where(key)}: conflicts, and nothing is there"
                        ) from None
                    time.sleep(0.05)

    def put(self, key: str, data: bytes) -> None:
        self._write("write", key, data)

    def get(self, key: str) -> bytes:
        first = self._range(key, 0, BLOCK_BYTES, None)
        if first.size <= len(first.data):
            return first.data
        parts = [first.data]
        for offset in range(BLOCK_BYTES, first.size, BLOCK_BYTES):
            parts.append(self._range(key, offset, min(BLOCK_BYTES, first.size - offset), first.etag).data)
        return b"".join(parts)

    def list(self, prefix: str) -> list[Item]:
        def once(timeouts: Timeouts) -> list[Item]:
            found = self._client.list_blobs(name_starts_with=self.prefix + prefix, **timeouts)
            return [Item(b.name.removeprefix(self.prefix), int(b.size)) for b in found]

        return sorted(self._tried(f"list {self.where(prefix)}", once), key=lambda i: i.key)

    def delete(self, key: str) -> None:
        blob = self._blob(key)
        try:
            self._tried(
                f"delete {self.where(key)}",
                lambda timeouts: blob.delete_blob(**timeouts),
            )
        except Missing:
            return

    def age_s(self, key: str) -> float | None:
        """Whole seconds: both times are the service's own, in its answer to one request."""
        blob, said = self._blob(key), dict[str, str]()
        try:
            found = self._tried(
                f"look at {self.where(key)}",
                lambda timeouts: blob.get_blob_properties(
                    raw_response_hook=lambda answer: said.update(answer.http_response.headers), **timeouts
                ),
            )
        except Missing:
            return None
        now = next((v for k, v in said.items() if k.lower() == "date"), None)
        written = found.last_modified
        if now is None or written is None:
            raise Refused(errno.EPROTO, f"look at {self.where(key)}: the answer has no date")
        return max(0.0, (parsedate_to_datetime(now) - written).total_seconds())

    def touch(self, key: str) -> bool:
        """Never needed: a container is not full."""
        return False

    def digest(self, key: str) -> tuple[int, str]:
        sha, first = hashlib.sha256(), self._range(key, 0, BLOCK_BYTES, None)
        sha.update(first.data)
        done = len(first.data)
        with ThreadPoolExecutor(2) as pool:  # the next block travels while this one is hashed
            ahead: Future[Part] | None = None
            while done < first.size:
                length = min(BLOCK_BYTES, first.size - done)
                part = ahead.result() if ahead else self._range(key, done, length, first.etag)
                done += len(part.data)
                ahead = None
                if done < first.size:
                    ahead = pool.submit(
                        self._range, key, done, min(BLOCK_BYTES, first.size - done), first.etag
                    )
                sha.update(part.data)
        return first.size, sha.hexdigest()

    def settle(self, prefix: str) -> None:
        """A blob that was acknowledged is durable."""

    def where(self, key: str) -> str:
        account = urlsplit(self.account_url)
        name = account.path.strip("/") or (account.hostname or "").split(".")[0]
        return f"az://{name}/{self.container_name}/{self.prefix}{key}"

    def upload(self, files: Mapping[str, Path], progress: Progress = quiet) -> dict[str, tuple[int, str]]:
        return moving.upload(_Moves(self), files, self.threads, progress)

    def download(self, files: Mapping[str, Path], progress: Progress = quiet) -> dict[str, tuple[int, str]]:
        return moving.download(_Moves(self), files, self.threads, progress)

    def _write(self, what: str, key: str, data: bytes) -> None:
        check_key(key)

        def once(timeouts: Timeouts) -> None:
            if not self._lean.write(self.prefix + key, data, timeouts):
                self._blob(key).upload_blob(data, overwrite=True, max_concurrency=1, **timeouts)

        self._tried(f"{what} {self.where(key)}", once)

    def _blob(self, key: str) -> BlobClient:
        check_key(key)
        return self._client.get_blob_client(self.prefix + key)

    def _range(self, key: str, offset: int, length: int, etag: str | None) -> Part:
        """Bytes from `offset` on, of the very version that `etag` names. Raises Missing."""
        check_key(key)

        def once(timeouts: Timeouts) -> Part:
            if (found := self._lean.read(self.prefix + key, offset, length, timeouts)) is not None:
                return found
            try:
                stream = self._blob(key).download_blob(
                    offset=offset, length=length, max_concurrency=1, **timeouts
                )
            except HttpResponseError as error:
                if error.status_code == 416 and offset == 0:
                    return Part(b"", 0, None)  # an empty blob has no first byte
                raise
            return Part(stream.readall(), int(_total(stream)), stream.properties.etag)

        part = self._tried(f"read {self.where(key)}", once)
        if etag is not None and part.etag != etag:
            raise OSError(errno.EIO, f"{self.where(key)} was replaced while it was read")
        return part

    def _tried(self, what: str, once: Callable[[Timeouts], T]) -> T:
        """Nothing asked for here can conflict: a 409 or 412 is a passing trouble of the service."""
        return tried(what, once, limit_s=self.limit_s, conflicts_pass=True)


class _Moves:
    """The requests that `infra.moving` makes."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def put(self, key: str, data: bytes) -> None:
        self._store._write("upload", key, data)

    def stage(self, key: str, name: str, data: bytes) -> None:
        blob = self._store._blob(key)
        self._store._tried(
            f"upload block {int(name)} of {self._store.where(key)}",
            lambda t: blob.stage_block(name, data, **t),
        )

    def commit(self, key: str, names: list[str]) -> None:
        blob = self._store._blob(key)
        self._store._tried(
            f"finish {self._store.where(key)}",
            lambda t: blob.commit_block_list([BlobBlock(n) for n in names], **t),
        )

    def part(self, key: str, offset: int, length: int, etag: str | None) -> Part:
        return self._store._range(key, offset, length, etag)


def _connections(threads: int) -> RequestsTransport:
    session = Session()
    adapter = HTTPAdapter(pool_connections=4, pool_maxsize=threads + 4)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return RequestsTransport(session=session, session_owner=True, connection_data_block_size=1 << 18)


def _total(stream: Any) -> int:
    """Size of the whole blob, from an answer about a part of it."""
    said = stream.properties.content_range
    return int(said.rsplit("/", 1)[1]) if said else int(stream.size)


def open_blob_store(url: str, **more: Any) -> BlobStore:
    """The store behind az://account/container/prefix, as this process's identity."""
    from infra.identity import endpoint

    parts = urlsplit(url)
    container, _, prefix = parts.path.strip("/").partition("/")
    if parts.scheme != "az" or not parts.netloc or not container:
        raise ValueError(f"{url!r} is not az://account/container/prefix")
    limit = os.environ.get(LIMIT_VARIABLE)
    if limit:
        try:
            more.setdefault("limit_s", max(1.0, float(limit)))
        except ValueError:
            raise ValueError(f"{LIMIT_VARIABLE}={limit} is no number of seconds") from None
    return BlobStore(endpoint(parts.netloc), container, prefix, **more)
