"""Where a run's log and checkpoints live: the few operations the protocol needs, and the folder that has them.

A `Store` is a flat map from keys ("log/3.json") to bytes, with one primitive that decides races: `put_new`
creates a key whole and durable or raises `Exists`. On a folder that is a hard link from a finished file (or
O_EXCL where the file system knows no links); on Azure Blob it is If-None-Match.

Holds on POSIX file systems that order a link or O_EXCL between machines (local disks, NFS since v3).
"""

import contextlib
import errno
import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from infra.objects import Exists, Item, Missing, Progress, Store, check_key, quiet
from launcher.errors import Failed, WrongInput

CHUNK_BYTES = 4 << 20
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""A disk, or a user's share of it, that has no room."""


def open_store(url: str) -> Store:
    """The store behind a folder's path or az://account/container/prefix. Raises WrongInput, or Failed without azure."""
    if url.startswith("az://"):
        try:
            from infra.blob import open_blob_store
        except ModuleNotFoundError as error:
            raise Failed(
                f"{url}: {error.name} is not installed here: pip install 'losscast[azure]'"
            ) from error
        try:
            return open_blob_store(url)
        except ValueError as error:
            raise WrongInput(str(error)) from error
    if "://" in url:
        raise WrongInput(f"{url}: no storage is called {url.split('://')[0]}://. Use a folder, or az://...")
    return FolderStore(Path(url).expanduser().resolve())


class FolderStore:
    """A store in a folder, on one machine or shared between several."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def path(self, key: str) -> Path:
        """The file behind a key. Raises ValueError for a key that leaves the folder."""
        check_key(key)
        return self.root / key

    def put_new(self, key: str, data: bytes) -> None:
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._scratch(path, data)
        try:
            os.link(scratch, path)
        except FileExistsError:
            raise Exists(key) from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            self._exclusive(path, data)
        finally:
            scratch.unlink(missing_ok=True)
        _sync_folder(path.parent)

    def put(self, key: str, data: bytes) -> None:
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._scratch(path, data)
        try:
            os.replace(scratch, path)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)

    def get(self, key: str) -> bytes:
        try:
            return self.path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise Missing(key) from None

    def list(self, prefix: str) -> list[Item]:
        folder = self.path(prefix) if prefix.endswith("/") or not prefix else self.path(prefix).parent
        found: list[Item] = []
        for base, _, names in os.walk(folder):
            for name in names:
                path = Path(base, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and not name.startswith(".new-"):
                    with contextlib.suppress(FileNotFoundError):
                        found.append(Item(key, path.lstat().st_size))
        return sorted(found, key=lambda item: item.key)

    def delete(self, key: str) -> None:
        path = self.path(key)
        path.unlink(missing_ok=True)
        for parent in path.parents:  # folders that are empty now; ends at the first that is not
            if parent == self.root:
                return
            try:
                parent.rmdir()
            except OSError:
                return

    def age_s(self, key: str) -> float | None:
        """By the file server's clock: the time of a file written now, less the key's."""
        try:
            written = self.path(key).stat().st_mtime
        except FileNotFoundError:
            return None
        probe = self.root / f".new-{secrets.token_hex(8)}"
        try:
            probe.touch()
            return max(0.0, probe.stat().st_mtime - written)
        except OSError as error:
            if error.errno not in FULL:
                raise
            os.utime(self.root)  # no room even for an empty file
            return max(0.0, self.root.stat().st_mtime - written)
        finally:
            probe.unlink(missing_ok=True)

    def touch(self, key: str) -> bool:
        try:
            os.utime(self.path(key))
        except FileNotFoundError:
            return False
        return True

    def digest(self, key: str) -> tuple[int, str]:
        path, sha, size = self.path(key), hashlib.sha256(), 0
        if path.is_symlink():
            raise Missing(f"{key} is a link")
        try:
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK_BYTES):
                    sha.update(chunk)
                    size += len(chunk)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise Missing(key) from None
        return size, sha.hexdigest()

    def settle(self, prefix: str) -> None:
        """fsync every file under the prefix, and every folder from there up to the root."""
        top = self.path(prefix.rstrip("/"))
        for base, _, names in os.walk(top, topdown=False):
            for name in names:
                descriptor = os.open(os.path.join(base, name), os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            _sync_folder(Path(base))
        for parent in top.parents:
            _sync_folder(parent)
            if parent == self.root:
                return

    def upload(self, files: Mapping[str, Path], progress: Progress = quiet) -> dict[str, tuple[int, str]]:
        total, done, digests = sum(path.stat().st_size for path in files.values()), 0, {}
        for key, source in files.items():
            path = self.path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.parent / f".new-{os.getpid()}-{threading.get_ident()}-{secrets.token_hex(4)}"
            try:
                digests[key] = _copy(source, scratch, lambda n, before=done: progress(before + n, total))
                os.replace(scratch, path)
            except OSError:
                scratch.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)
            done += digests[key][0]
        return digests

    def download(self, files: Mapping[str, Path], progress: Progress = quiet) -> dict[str, tuple[int, str]]:
        done, digests = 0, {}
        try:
            total = sum(self.path(key).stat().st_size for key in files)
            for key, target in files.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                digests[key] = _copy(
                    self.path(key), target, lambda n, before=done: progress(before + n, total)
                )
                done += digests[key][0]
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise Missing(str(error.filename)) from None
        return digests

    def where(self, key: str) -> str:
        return str(self.path(key))

    def _scratch(self, path: Path, data: bytes) -> Path:
        """The data in a file of its own in the same folder, on disk."""
        scratch = path.parent / f".new-{os.getpid()}-{threading.get_ident()}-{secrets.token_hex(4)}"
        try:
            _write(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), data)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
        return scratch

    def _exclusive(self, path: Path, data: bytes) -> None:
        """Without hard links: create it ourselves. A crash can leave part of it, which its reader must notice."""
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            raise Exists(path.name) from None
        _write(descriptor, data)


def _write(descriptor: int, data: bytes) -> None:
    """All of the data, on disk; closes the descriptor."""
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: Path, target: Path, told: Callable[[int], None]) -> tuple[int, str]:
    """Copy a file, durable when it returns; its size and sha256, of the bytes that were copied."""
    sha, size = hashlib.sha256(), 0
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as written:
        while chunk := read.read(CHUNK_BYTES):
            view = memoryview(chunk)
            while view:
                view = view[written.write(view) :]
            sha.update(chunk)
            size += len(chunk)
            told(size)
        os.fsync(written.fileno())
    return size, sha.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make names in a folder durable. File systems that can't sync a folder are left as they are."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
