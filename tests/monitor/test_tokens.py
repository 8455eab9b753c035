"""Who is let in, and who no more."""

import json
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitor.errors import Failed, WrongInput
from monitor.service.attention import Attention
from monitor.service.tokens import FILE, SESSION_S, Tokens, parse_scopes


def test_a_secret_is_kept_nowhere_and_the_file_is_private(tmp_path: Path) -> None:
    secret = Tokens(tmp_path / "store").create(("read",), "me")
    path = tmp_path / "store" / FILE
    assert secret not in path.read_text() and secret[4:] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["tokens"][0]["name"] == "me"


def test_a_live_service_sees_new_and_revoked_tokens(tmp_path: Path) -> None:
    live, command_line = Tokens(tmp_path), Tokens(tmp_path)
    assert live.find("lct_guess") is None
    secret = command_line.create(("ingest:a", "read"), "one")
    found = live.find(secret)
    assert found is not None and found.may_write("a") and not found.may_write("b") and found.may("read")
    cookie = live.session(found, now=1000.0)
    assert live.of_session(cookie, 1001.0) == found
    assert command_line.revoke("one") == 1
    assert live.find(secret) is None and live.of_session(cookie, 1001.0) is None


def test_a_session_ends_and_can_not_be_forged_and_outlives_a_restart(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    token = tokens.find(tokens.create(("read",)))
    assert token is not None
    cookie = tokens.session(token, now=1000.0)
    assert Tokens(tmp_path).of_session(cookie, 1001.0) == token
    assert tokens.of_session(cookie, 1001.0 + SESSION_S) is None
    id, until, signature = cookie.split(".")
    for forged in (
        "",
        "...",
        f"{id}.{int(until) + 1}.{signature}",
        f"{id}.{until}.{'0' * 64}",
        f"{id}.é.{signature}",
        cookie + "0",
    ):
        assert tokens.of_session(forged, 1001.0) is None


def test_a_damaged_file_lets_nobody_in_and_says_so(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    secret = tokens.create(("read",))
    (tmp_path / FILE).write_text('{"tokens": [{"id"')
    assert tokens.find(secret) is None
    with pytest.raises(Failed, match="damaged"):
        tokens.create(("read",))


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that other users can reach."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        yield Path(made)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("of_whom", ["the folder", "the file before"])
def test_what_root_writes_beside_a_service_of_another_user_is_the_service_s(
    folder: Path, of_whom: str
) -> None:
    names = ["tokens.json", "attention.json"]
    if of_whom == "the folder":
        os.chown(folder, 65534, 65534)
        names += [f"{name}.lock" for name in names]
    Tokens(folder).create(("read",))
    Attention(folder).mute("a", 60, 1000.0)
    for name in names[:2]:
        if of_whom == "the file before":
            os.chown(folder / name, 65534, 65534)
        (folder / (name + ".new")).symlink_to(folder / "aim")  # nothing that somebody left there is followed
    Tokens(folder).create(("read",))
    Attention(folder).mute("b", 60, 1000.0)
    for name in names:
        there = (folder / name).stat()
        assert (there.st_uid, there.st_gid) == (65534, 65534), name
        assert stat.S_IMODE(there.st_mode) == 0o600
    assert not (folder / "aim").exists()


def test_a_file_that_can_not_be_read_is_said_once_and_read_when_it_can_be(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = Tokens(folder).create(("read",))
    Attention(folder).mute("a", 60, 1000.0)
    for name in ("tokens.json", "attention.json"):
        os.chmod(folder / name, 0o000)
    tokens, attention, before = Tokens(folder), Attention(folder), os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        for _ in range(3):
            assert tokens.find(secret) is None and not attention.mutes(1001.0)
    finally:
        os.seteuid(before)
    said = capsys.readouterr().err
    assert (
        said.count("tokens.json: Permission denied") == said.count("attention.json: Permission denied") == 1
    )
    for name in ("tokens.json", "attention.json"):
        os.chmod(folder / name, 0o600)
    assert tokens.find(secret) is not None and attention.mutes(1001.0)


def test_tokens_made_at_once_are_all_there(tmp_path: Path) -> None:
    threads = [threading.Thread(target=lambda: Tokens(tmp_path).create(("read",))) for _ in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(Tokens(tmp_path).list()) == 16


@pytest.mark.parametrize(
    "bad", ["", ",", "write", "ingest:", "ingest:A", "ingest:../x", "read,admin", "read:x"]
)
def test_unknown_scopes_are_refused(bad: str) -> None:
    with pytest.raises(WrongInput, match="--scope"):
        parse_scopes(bad)
    assert parse_scopes("ingest, read,ingest:my-run") == ("ingest", "read", "ingest:my-run")
