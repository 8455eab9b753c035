"""Who may do what: bearer tokens with scopes, and the browser sessions made from them.

A token is 32 random bytes, shown once; the file beside the store keeps its SHA-256 (nothing slower is needed for a
secret that can't be guessed). The file is replaced as a whole, under a lock, so that making and revoking tokens works
beside a live service, which reads it again when it has changed.

Scopes: `read`, `ingest` (any run), `ingest:RUN` (that run alone), `operate`. A session is a signed cookie that names its
token, so it ends when the token is revoked or SESSION_S have passed, and outlives a restart.
"""

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from monitor.errors import GIVE_A_STORE, Failed, WrongInput, unwritable
from monitor.schema import is_run_id

FILE = "tokens.json"
KEY_FILE = "session.key"
SCOPES = ("read", "ingest", "operate")
SESSION_S = 14 * 86400
PREFIX = "lct_"
Stamp = tuple[int, int, int, int]
"""What tells one state of a file from another, its rights included."""


@dataclass(frozen=True)
class Token:
    """One token, without its secret. Times are seconds since the epoch."""

    id: str
    sha256: str
    scopes: tuple[str, ...]
    name: str
    created: float
    max_runs: int | None = 10_000
    """Runs it may register; None for any number."""

    def may(self, scope: str) -> bool:
        """True when it has this scope."""
        return scope in self.scopes

    def may_write(self, run: str) -> bool:
        """True when it may send events of this run."""
        return "ingest" in self.scopes or f"ingest:{run}" in self.scopes

    @property
    def may_ingest(self) -> bool:
        """True when it may send events of some run."""
        return any(scope == "ingest" or scope.startswith("ingest:") for scope in self.scopes)


def parse_scopes(text: str) -> tuple[str, ...]:
    """Scopes from `ingest,read`. Raises WrongInput."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for scope in found:
        kind, _, run = scope.partition(":")
        if scope not in SCOPES and not (kind == "ingest" and is_run_id(run)):
            raise WrongInput(f"--scope {scope}: unknown; use {', '.join(SCOPES)} or ingest:RUN")
    if not found:
        raise WrongInput(f"--scope: empty; use {', '.join(SCOPES)} or ingest:RUN, separated by commas")
    return found


class Tokens:
    """The tokens of one store. Safe to share between threads."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self._lock = threading.Lock()
        self._stamp: Stamp | None = None
        self._by_hash: dict[str, Token] = {}
        self._by_id: dict[str, Token] = {}
        self._key: bytes | None = None

    # for the command line

    def create(self, scopes: tuple[str, ...], name: str = "", max_runs: int | None = 10_000) -> str:
        """A new token's secret, which is kept nowhere."""
        secret = PREFIX + secrets.token_urlsafe(32)
        made = Token(
            secrets.token_hex(6), _digest(secret), scopes, name[:64], round(time.time(), 3), max_runs
        )
        with self._changing() as tokens:
            tokens.append(made)
        return secret

    def revoke(self, id_or_name: str) -> int:
        """Forget the token with this id, or those with this name. How many there were."""
        with self._changing() as tokens:
            keep = [t for t in tokens if id_or_name not in (t.id, t.name)]
            gone = len(tokens) - len(keep)
            tokens[:] = keep
        return gone

    def list(self) -> list[Token]:
        """All of them, oldest first. Raises Failed when the file is damaged."""
        return _read(self.path)

    @contextlib.contextmanager
    def _changing(self) -> Iterator["list[Token]"]:
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with locked(folder / (FILE + ".lock")):
                tokens = _read(self.path)
                yield tokens
                write_whole(self.path, json.dumps({"tokens": [asdict(t) for t in tokens]}, indent=1).encode())
        except OSError as error:
            raise unwritable(folder, error, GIVE_A_STORE) from error

    # for the service

    def find(self, secret: str) -> Token | None:
        """The token with this secret."""
        self._refresh()
        return self._by_hash.get(_digest(secret)) if secret.startswith(PREFIX) else None

    def holds(self, token: Token) -> bool:
        """Whether it is one of them still: not revoked since it was found."""
        self._refresh()
        return token in self._by_hash.values()

    def session(self, token: Token, now: float) -> str:
        """The value of a cookie that stands for the token until SESSION_S from now."""
        said = f"{token.id}.{int(now) + SESSION_S}"
        return f"{said}.{self._sign(said)}"

    def of_session(self, cookie: str, now: float) -> Token | None:
        """The token behind a cookie; None when it is forged, over, or its token revoked."""
        said, _, signature = cookie.rpartition(".")
        id, _, until = said.partition(".")
        if not until.isdecimal() or not cookie.isascii() or len(until) > 15:
            return None
        if not hmac.compare_digest(signature, self._sign(said)) or int(until) < now:
            return None
        self._refresh()
        return self._by_id.get(id)

    def _sign(self, said: str) -> str:
        if self._key is None:
            self._key = _session_key(self.path.parent / KEY_FILE)
        return hmac.new(self._key, said.encode(), "sha256").hexdigest()

    def _refresh(self) -> None:
        """Read the file again if it was replaced. A damaged file lets nobody in."""
        stamp = stamp_of(self.path)
        if stamp == self._stamp:
            return
        with self._lock:
            if stamp == self._stamp:
                return
            try:
                tokens = _read(self.path)
            except Failed as error:
                tokens = []
                say_unreadable(error, "nobody is let in")
            self._by_hash = {t.sha256: t for t in tokens}
            self._by_id = {t.id: t for t in tokens}
            self._stamp = stamp


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def stamp_of(path: Path) -> Stamp | None:
    """Another one whenever the file was replaced or its rights changed; None where there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size


def say_unreadable(error: Failed, so: str) -> None:
    """Once for each state of the file: a service that can't read it looks like one that has none."""
    hint = (
        " (made by another user? `chown` it to the service's)"
        if isinstance(error.__cause__, PermissionError)
        else ""
    )
    print(f"losscast: {error}{hint}: {so} until it can be read", file=sys.stderr, flush=True)


def _made(path: Path, instead_of: Path | None = None) -> int:
    """A new file, for its owner alone: who owns the one that it is to replace, or else the folder, where we may say so. So
    what root writes beside a service of another user is the service's. A link that lies there is not followed."""
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    like = os.stat(path.parent)
    if instead_of is not None:
        with contextlib.suppress(FileNotFoundError):
            like = os.lstat(instead_of)
    if like.st_uid != os.geteuid():
        with contextlib.suppress(OSError):
            os.fchown(out, like.st_uid, like.st_gid)
    return out


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """While nobody else holds this file, which is made where it is not there."""
    try:
        held = _made(path)
    except FileExistsError:
        held = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _read(path: Path) -> list[Token]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from error
    try:
        return [Token(**{**t, "scopes": tuple(t["scopes"])}) for t in json.loads(text)["tokens"]]
    except (ValueError, TypeError, KeyError) as error:
        raise Failed(f"{path}: damaged ({error}); move it away and make new tokens") from error


def write_whole(path: Path, content: bytes) -> None:
    """Replace the file as a whole, on disk before this returns."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)  # of a writer that was killed
    with open(_made(temporary, path), "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _session_key(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        key = path.read_bytes()
        if len(key) == 32:
            return key
    key = secrets.token_bytes(32)
    with contextlib.suppress(OSError):  # a full disk: sessions end with this process instead
        write_whole(path, key)
    return key
