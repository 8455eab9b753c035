"""A run's log and checkpoints on Azure Blob: `launcher.storage.Store` over azure-storage-blob.

    az://account/container/prefix

`put_new` is one PUT with If-None-Match, so the service decides races. A conflict, like an answer that never came, says
nothing about who wrote: the blob is read back, and one's own bytes (entries carry a nonce) are success.

Files move in blocks of 8 MiB over one pool of threads, whichever file they belong to, so that 500 small files and 8 large
ones both keep every connection busy. An upload is hashed while it is read, a download from the bytes that lie on the disk.
Memory: threads + 2 blocks.

Each request is tried again after errors that pass (no answer, 408, 429, 5xx, a body cut short) until `limit_s` of the
operation, or of the block, is over: then TooLate, which leaves the outcome open. The SDK's own retries are off: they
count tries, not time. Other failures are OSError at once. All are one line. A server that sends a byte now and then
can stretch a single try: what must act in time (the lease) watches the clock in a thread of its own.

Needs a container that exists, strong consistency (Azure Blob has it) and no versioning tricks on the prefix.
"""

import errno
import hashlib
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceModifiedError,
    ResourceNotFoundError,
)
from azure.core.pipeline.transport import RequestsTransport
from azure.storage.blob import BlobBlock, BlobClient, ContainerClient
from requests import Session
from requests.adapters import HTTPAdapter

from launcher.storage import Exists, Item, Missing, Progress, check_key, quiet

T = TypeVar("T")
Timeouts = dict[str, Any]
"""Keywords of the SDK: how long one try waits for a connection, and for an answer."""

BLOCK_BYTES = 8 << 20
MAX_BLOCKS = 40_000
"""Of one blob; Azure allows 50,000."""
THREADS = 8
LIMIT_S = 120.0
TRY_S = 20.0
"""A single try waits this long for an answer, at most."""
PASSING = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""


logging.getLogger("azure").addHandler(logging.NullHandler())  # it says in pages what we say in a line


class Refused(OSError):
    """Azure said no, and would say it again. One line."""

    exit_status = 1

    def __str__(self) -> str:
        return str(self.strerror)


class TooLate(TimeoutError):
    """The time limit is over, and the outcome open: what was asked may have been done. One line."""

    exit_status = 1

    def __str__(self) -> str:
        return str(self.strerror)


@dataclass
class _Arriving:
    """One file of a download."""

    key: str
    path: Path
    size: int = -1
    left: int = 1
    """Blocks that are not on the disk yet."""
    digest: tuple[int, str] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


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
                return self._tried(f"create {self.where(key)}", once, deadline=deadline)
            except _Conflict:
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
        blob = self._blob(key)
        self._tried(
            f"write {self.where(key)}",
            lambda timeouts: blob.upload_blob(data, overwrite=True, max_concurrency=1, **timeouts),
            conflicts_pass=True,
        )

    def get(self, key: str) -> bytes:
        blob = self._blob(key)
        first = self._range(blob, key, 0, BLOCK_BYTES, None)
        if first.size <= len(first.data):
            return first.data
        parts = [first.data]
        for offset in range(BLOCK_BYTES, first.size, BLOCK_BYTES):
            parts.append(
                self._range(blob, key, offset, min(BLOCK_BYTES, first.size - offset), first.etag).data
            )
        return b"".join(parts)

    def list(self, prefix: str) -> list[Item]:
        def once(timeouts: Timeouts) -> list[Item]:
            found = self._client.list_blobs(name_starts_with=self.prefix + prefix, **timeouts)
            return [Item(b.name.removeprefix(self.prefix), int(b.size)) for b in found]

        return sorted(
            self._tried(f"list {self.where(prefix)}", once, conflicts_pass=True), key=lambda i: i.key
        )

    def delete(self, key: str) -> None:
        blob = self._blob(key)
        try:
            self._tried(
                f"delete {self.where(key)}",
                lambda timeouts: blob.delete_blob(**timeouts),
                conflicts_pass=True,
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
                conflicts_pass=True,
            )
        except Missing:
            return None
        now = next((v for k, v in said.items() if k.lower() == "date"), None)
        written = found.last_modified
        if now is None or written is None:
            raise Refused(errno.EPROTO, f"look at {self.where(key)}: the answer has no date")
        return max(0.0, (parsedate_to_datetime(now) - written).total_seconds())

    def digest(self, key: str) -> tuple[int, str]:
        blob, sha = self._blob(key), hashlib.sha256()
        first = self._range(blob, key, 0, BLOCK_BYTES, None)
        sha.update(first.data)
        done = len(first.data)
        with ThreadPoolExecutor(2) as pool:  # the next block travels while this one is hashed
            ahead: Future[_Range] | None = None
            while done < first.size:
                length = min(BLOCK_BYTES, first.size - done)
                part = ahead.result() if ahead else self._range(blob, key, done, length, first.etag)
                done += len(part.data)
                ahead = None
                if done < first.size:
                    ahead = pool.submit(
                        self._range, blob, key, done, min(BLOCK_BYTES, first.size - done), first.etag
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
        sizes = {key: path.stat().st_size for key, path in files.items()}
        meter = _Meter(sum(sizes.values()), progress)
        digests: dict[str, tuple[int, str]] = {}
        room = threading.Semaphore(self.threads + 2)
        with _Crew(self.threads) as crew:
            for key, path in files.items():
                digests[key] = self._send(crew, room, meter, key, path, sizes[key])
        return digests

    def _send(
        self, crew: "_Crew", room: threading.Semaphore, meter: "_Meter", key: str, path: Path, size: int
    ) -> tuple[int, str]:
        """Read and hash one file, its blocks handed to the crew; the last one to arrive makes the blob."""
        blob, sha, block = self._blob(key), hashlib.sha256(), max(BLOCK_BYTES, math.ceil(size / MAX_BLOCKS))
        whole, names = size <= block, [f"{i:08d}" for i in range(max(1, math.ceil(size / block)))]
        left, lock, read = len(names), threading.Lock(), 0

        def carry(index: int, data: bytes) -> None:
            nonlocal left
            try:
                if whole:
                    self._tried(
                        f"upload {self.where(key)}",
                        lambda t: blob.upload_blob(data, overwrite=True, max_concurrency=1, **t),
                        conflicts_pass=True,
                    )
                else:
                    self._tried(
                        f"upload block {index} of {self.where(key)}",
                        lambda t: blob.stage_block(names[index], data, **t),
                        conflicts_pass=True,
                    )
            finally:
                room.release()
            meter.add(len(data))
            with lock:
                left -= 1
                last = left == 0
            if last and not whole:
                self._tried(
                    f"finish {self.where(key)}",
                    lambda t: blob.commit_block_list([BlobBlock(n) for n in names], **t),
                    conflicts_pass=True,
                )

        with path.open("rb", buffering=0) as file:
            for index in range(len(names)):
                room.acquire()
                crew.check()
                data = _read_fully(file, min(block, size - read))
                read += len(data)
                sha.update(data)
                crew.do(carry, index, data)
            if read != size or file.read(1):
                raise OSError(errno.EIO, f"{path} changed while it was uploaded")
        return size, sha.hexdigest()

    def download(self, files: Mapping[str, Path], progress: Progress = quiet) -> dict[str, tuple[int, str]]:
        arriving = [_Arriving(key, path) for key, path in files.items()]
        meter = _Meter(0, progress)
        for folder in {path.parent for path in files.values()}:
            folder.mkdir(parents=True, exist_ok=True)
        with _Crew(self.threads) as crew:
            for one in arriving:
                crew.do(self._receive_first, crew, meter, one)
        return {one.key: one.digest for one in arriving if one.digest is not None}

    def _receive_first(self, crew: "_Crew", meter: "_Meter", one: _Arriving) -> None:
        """The first block of a file, which tells its size: a small file is done, for a large one the rest is ordered."""
        blob = self._blob(one.key)
        first = self._range(blob, one.key, 0, BLOCK_BYTES, None)
        one.size = first.size
        meter.expect(first.size)
        descriptor = os.open(one.path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
        try:
            _write_at(descriptor, first.data, 0)
        finally:
            os.close(descriptor)
        meter.add(len(first.data))
        if first.size <= len(first.data):
            one.digest = first.size, hashlib.sha256(first.data).hexdigest()
            return
        offsets = range(len(first.data), first.size, BLOCK_BYTES)
        one.left = len(offsets)
        for offset in offsets:
            crew.do(self._receive, meter, one, blob, offset, first.etag)

    def _receive(
        self, meter: "_Meter", one: _Arriving, blob: BlobClient, offset: int, etag: str | None
    ) -> None:
        part = self._range(blob, one.key, offset, min(BLOCK_BYTES, one.size - offset), etag)
        descriptor = os.open(one.path, os.O_RDWR)
        try:
            _write_at(descriptor, part.data, offset)
        finally:
            os.close(descriptor)
        meter.add(len(part.data))
        with one.lock:
            one.left -= 1
            if one.left:
                return
        with one.path.open("rb", buffering=0) as file:
            one.digest = one.path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()

    def _blob(self, key: str) -> BlobClient:
        check_key(key)
        return self._client.get_blob_client(self.prefix + key)

    def _range(self, blob: BlobClient, key: str, offset: int, length: int, etag: str | None) -> "_Range":
        """Bytes from `offset` on, of the very version that `etag` names. Raises Missing."""
        only: dict[str, Any] = {}
        if etag is not None:
            from azure.core import MatchConditions

            only = {"etag": etag, "match_condition": MatchConditions.IfNotModified}

        def once(timeouts: Timeouts) -> _Range:
            try:
                stream = blob.download_blob(
                    offset=offset, length=length, max_concurrency=1, **only, **timeouts
                )
            except HttpResponseError as error:
                if error.status_code == 416 and offset == 0:
                    return _Range(b"", 0, None)  # an empty blob has no first byte
                raise
            return _Range(bytes(stream.readall()), int(_total(stream)), stream.properties.etag)

        try:
            return self._tried(f"read {self.where(key)}", once)
        except _Conflict:
            raise OSError(errno.EIO, f"{self.where(key)} was replaced while it was read") from None

    def _tried(
        self,
        what: str,
        once: Callable[[Timeouts], T],
        *,
        deadline: float | None = None,
        conflicts_pass: bool = False,
    ) -> T:
        """`once`, again while the error may pass and there is time. It is given the timeouts of this try.

        conflicts_pass  nothing we asked for can conflict: a 409 or 412 is a passing trouble of the service
        Raises Missing, TooLate, Refused, and _Conflict unless conflicts pass.
        """
        began, tries = time.monotonic(), 0
        deadline = began + self.limit_s if deadline is None else deadline
        while True:
            tries += 1
            left = max(0.05, deadline - time.monotonic())
            wait_s = min(TRY_S, left / 3.5)  # a read tries three times inside the SDK
            try:
                return once({"connection_timeout": min(5.0, wait_s), "read_timeout": wait_s})
            except ResourceNotFoundError as error:
                if getattr(error, "error_code", None) == "ContainerNotFound":
                    raise Refused(
                        errno.ENOENT, f"{what}: there is no container {self.container_name!r}: {_line(error)}"
                    ) from error
                raise Missing(what) from None
            except AzureError as error:
                status = error.status_code if isinstance(error, HttpResponseError) else None
                if status in (409, 412) and not conflicts_pass:
                    raise _Conflict from error
                passing = status in PASSING or status in (409, 412) or _unanswered(error)
                if not passing:
                    raise _refusal(what, status, error) from error
                pause = min(5.0, 0.1 * 2 ** min(tries, 8)) * random.uniform(0.5, 1.0)
                if time.monotonic() + pause >= deadline:
                    raise TooLate(
                        errno.ETIMEDOUT,
                        f"{what}: given up after {time.monotonic() - began:.1f} s and {tries} tries: {_line(error)}",
                    ) from error
                time.sleep(pause)


@dataclass(frozen=True, slots=True)
class _Range:
    data: bytes
    size: int
    """Of the whole blob."""
    etag: str | None


class _Conflict(Exception):
    """409 or 412: somebody wrote before us, or an earlier try of ours did."""


class _Meter:
    """Bytes done of bytes in all, told as they move."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.total, self.done, self._progress, self._lock = total, 0, progress, threading.Lock()

    def expect(self, size: int) -> None:
        with self._lock:
            self.total += size

    def add(self, size: int) -> None:
        with self._lock:
            self.done += size
            self._progress(self.done, self.total)


class _Crew:
    """Threads that carry blocks, and may order more. At the end of the context all is carried; the first error is raised
    and what had not begun is dropped."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="losscast-blob")
        self._lock, self._pending = threading.Lock(), set[Future[None]]()

    def do(self, work: Callable[..., None], *args: Any) -> None:
        with self._lock:
            self._pending.add(self._pool.submit(work, *args))

    def check(self) -> None:
        """Raise what went wrong so far."""
        with self._lock:
            done = {f for f in self._pending if f.done()}
            self._pending -= done
        for future in done:
            future.result()

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            while error is None:
                with self._lock:
                    pending = set(self._pending)
                if not pending:
                    return
                wait(pending, return_when=FIRST_COMPLETED)
                self.check()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


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


def _read_fully(file: Any, count: int) -> bytes:
    parts = []
    while count > 0:
        part = file.read(count)
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _unanswered(error: AzureError) -> bool:
    """No answer came, or only a part of it. An identity that gave no token is not asked on and on: the next operation
    will."""
    if isinstance(error, ClientAuthenticationError):
        return False
    return (
        not isinstance(error, HttpResponseError)
        or error.status_code is None
        or 200 <= error.status_code < 300
    )


def _refusal(what: str, status: int | None, error: AzureError) -> OSError:
    """What Azure refused, and what to do about it."""
    if isinstance(error, ClientAuthenticationError) or status in (401, 403):
        return Refused(
            errno.EACCES,
            f"{what}: refused ({_line(error)}). On a cluster, check the workload identity and its role on the container; "
            "on your own machine, `az login`.",
        )
    return Refused(errno.EIO, f"{what}: {_line(error)}")


def _line(error: BaseException) -> str:
    """An error of Azure in one line: its code where it has one, and the first words."""
    code = getattr(error, "error_code", None)
    if isinstance(error, ClientAuthenticationError) and code is None:
        lines = [x.strip() for x in str(error).splitlines()]
        causes = [x for x in lines if x and x.count(": ") and not x.startswith(("Attempted", "To mitigate"))]
        return "no token: " + (" ".join(causes) or lines[0])[:400]
    text = " ".join(str(getattr(error, "message", None) or error).split())
    if plain := re.findall(r"\[Errno \d+\] ([^)\"']+)|(\w+ timed out)", text):
        text = "nobody answers: " + "".join(plain[-1])
    for end in (" RequestId:", " Time:", " ErrorCode:", " Content:"):
        text = text.split(end)[0]
    status = getattr(error, "status_code", None)
    head = " ".join(str(getattr(part, "value", part)) for part in (status, code) if part)
    return f"{head}: {text[:300]}" if head else text[:300] or type(error).__name__


def open_blob_store(url: str, **more: Any) -> BlobStore:
    """The store behind az://account/container/prefix, as this process's identity."""
    from infra.identity import endpoint

    parts = urlsplit(url)
    container, _, prefix = parts.path.strip("/").partition("/")
    if parts.scheme != "az" or not parts.netloc or not container:
        raise ValueError(f"{url!r} is not az://account/container/prefix")
    return BlobStore(endpoint(parts.netloc), container, prefix, **more)
