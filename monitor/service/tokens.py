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
        self._stamp: tuple[int, int, int] | None = None
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
            with open(folder / (FILE + ".lock"), "a", opener=_private) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
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
        try:
            stat = os.stat(self.path)
            stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        except FileNotFoundError:
            stamp = None
        if stamp == self._stamp:
            return
        with self._lock:
            try:
                tokens = _read(self.path)
            except Failed:
                tokens = []
            self._by_hash = {t.sha256: t for t in tokens}
            self._by_id = {t.id: t for t in tokens}
            self._stamp = stamp


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


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
    with open(temporary, "wb", opener=_private) as out:
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
