"""`losscast monitor serve | mute | token | ...`: the service, what is kept, and who may talk to it."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def register(commands: Any) -> None:
    """Add `monitor` to the command."""
    top = commands.add_parser(
        "monitor", help="the service that watches runs", description="The monitor service."
    )
    parts = top.add_subparsers(dest="part", metavar="PART", required=True)

    p = parts.add_parser("serve", help="run the service")
    p.add_argument("--listen", default="127.0.0.1:8700", metavar="HOST:PORT", help="default %(default)s")
    p.add_argument("--store", required=True, metavar="DIR", help="where everything is kept")
    p.add_argument("--tls-cert", metavar="FILE", help="PEM certificate chain")
    p.add_argument("--tls-key", metavar="FILE", help="PEM key; without it, in the certificate's file")
    p.add_argument(
        "--behind-proxy",
        action="store_true",
        help="listen without TLS off loopback, since a proxy does the TLS",
    )
    p.add_argument(
        "--url", metavar="URL",
        help="where people reach it, for the links in alerts (default: http://, or https:// with TLS, and --listen)",
    )  # fmt: skip
    p.add_argument("--teams", default="", metavar="A,B", help="teams that alerts are routed by")
    p.add_argument(
        "--keep-days", type=float, default=0.0, metavar="N",
        help="remove a run N days after it ended or was last heard of (default: never)",
    )  # fmt: skip
    p.add_argument(
        "--stalled-after", type=float, default=180.0, metavar="S",
        help="no run is called stalled or silent before it has made no step for S seconds (default %(default)g)",
    )  # fmt: skip
    p.set_defaults(func=serve)

    p = parts.add_parser("backup", help="copy the store, beside a live service")
    p.add_argument("target", metavar="FILE")
    p.add_argument("--store", required=True, metavar="DIR")
    p.set_defaults(func=backup)
    p = parts.add_parser("restore", help="put a backup where there is no store yet")
    p.add_argument("source", metavar="FILE")
    p.add_argument("--store", required=True, metavar="DIR")
    p.set_defaults(func=restore)
    p = parts.add_parser(
        "repair", help="check a stopped store; where it is damaged, write a new one from what is whole"
    )
    p.add_argument("--store", required=True, metavar="DIR")
    p.set_defaults(func=repair)
    p = parts.add_parser(
        "export", help="a run's samples as CSV, Parquet or TensorBoard events, beside a live service"
    )
    p.add_argument("run", metavar="RUN")
    p.add_argument("--store", required=True, metavar="DIR")
    p.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=".csv, .parquet, or a folder for TensorBoard (ends in /); without it, CSV on stdout",
    )
    p.set_defaults(func=export)

    p = parts.add_parser("mute", help="silence a run's alerts for a while; works beside a live service")
    p.add_argument("run", metavar="RUN")
    p.add_argument("--for", required=True, dest="how_long", metavar="TIME", help="90m, 2h, 1d; at most 30d")
    p.add_argument(
        "--alert", action="append", default=[], metavar="NAME", help="this one only; may be given again"
    )
    p.add_argument("--why", default="", metavar="TEXT", help="for those who wonder")
    p.add_argument("--store", required=True, metavar="DIR")
    p.set_defaults(func=mute)
    p = parts.add_parser("unmute", help="let a run's alerts sound again")
    p.add_argument("run", metavar="RUN")
    p.add_argument("--store", required=True, metavar="DIR")
    p.set_defaults(func=unmute)
    p = parts.add_parser("mutes", help="what is muted, until when, by whom")
    p.add_argument("--store", required=True, metavar="DIR")
    p.add_argument("--json", action="store_true")
    p.set_defaults(func=mutes)

    law = parts.add_parser("law", help="laws that the page draws")
    kinds = law.add_subparsers(dest="kind", metavar="DO", required=True)
    p = kinds.add_parser("add", help="put a law.json beside the store; works beside a live service")
    p.add_argument("law", metavar="LAW")
    p.add_argument("--store", required=True, metavar="DIR")
    p.set_defaults(func=add_law)

    token = parts.add_parser("token", help="make, list and revoke tokens; works beside a live service")
    kinds = token.add_subparsers(dest="kind", metavar="DO", required=True)
    p = kinds.add_parser("create", help="print a new token, once")
    p.add_argument("--store", required=True, metavar="DIR")
    p.add_argument(
        "--scope", default="ingest,read", help="of read, ingest, ingest:RUN, operate (default %(default)s)"
    )
    p.add_argument("--name", default="", help="for people")
    p.add_argument(
        "--max-runs", type=int, default=10_000, metavar="N", help="runs it may register (default %(default)s)"
    )
    p.set_defaults(func=create)
    p = kinds.add_parser("list", help="every token, without its secret")
    p.add_argument("--store", required=True, metavar="DIR")
    p.add_argument("--json", action="store_true")
    p.set_defaults(func=show)
    p = kinds.add_parser("revoke", help="forget a token at once")
    p.add_argument("id", metavar="ID_OR_NAME")
    p.add_argument("--store", required=True, metavar="DIR")
    p.set_defaults(func=revoke)


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    from monitor.errors import WrongInput
    from monitor.service.monitor import folder_of
    from monitor.service.serving import serve as run

    if not 1 <= args.stalled_after <= 86400:
        raise WrongInput(f"--stalled-after {args.stalled_after:g}: give 1 to 86400 seconds")
    if not args.keep_days >= 0:
        raise WrongInput(f"--keep-days {args.keep_days}: must not be below 0")
    return run(
        folder_of(args.store),
        args.listen,
        cert=args.tls_cert,
        key=args.tls_key,
        behind_proxy=args.behind_proxy,
        url=args.url,
        keep_days=args.keep_days,
        stalled_after_s=args.stalled_after,
        teams=frozenset(t.strip() for t in args.teams.split(",") if t.strip()),
    )


def mute(args: argparse.Namespace) -> int:
    """Silence a run's alerts for a while."""
    import getpass
    import time

    from monitor.service.attention import duration

    made = _attention(args).mute(
        args.run, duration(args.how_long), time.time(), alerts=tuple(args.alert), by=getpass.getuser(), why=args.why
    )  # fmt: skip
    until = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(made.until))
    print(f"{args.run}: {', '.join(made.alerts) or 'all its alerts'} muted until {until}", file=sys.stderr)
    return 0


def unmute(args: argparse.Namespace) -> int:
    """Let a run's alerts sound again."""
    import time

    from monitor.errors import WrongInput

    if not _attention(args).unmute(args.run, time.time()):
        raise WrongInput(f"{args.run}: is not muted; `losscast monitor mutes` lists what is")
    print(f"{args.run}: its alerts sound again", file=sys.stderr)
    return 0


def mutes(args: argparse.Namespace) -> int:
    """Print what is muted."""
    import json
    import time
    from dataclasses import asdict

    found = _attention(args).mutes(time.time())
    if args.json:
        print(json.dumps({run: asdict(mute) for run, mute in found.items()}))
        return 0
    for run, one in sorted(found.items()):
        until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(one.until))
        print(f"{run}  {', '.join(one.alerts) or 'all'}  until {until}  {one.by}  {one.why}")
    return 0


def _attention(args: argparse.Namespace) -> Any:
    from monitor.service.attention import Attention

    return Attention(_store_there(args))


def _store_there(args: argparse.Namespace) -> Path:
    from monitor.errors import WrongInput

    folder = Path(args.store).expanduser()
    if not folder.is_dir():
        raise WrongInput(
            f"{args.store}: no such store; give the folder that `losscast monitor serve --store` is given"
        )
    return folder


def add_law(args: argparse.Namespace) -> int:
    """Put a law beside the store."""
    from monitor.service.laws import add

    name = add(Path(args.store).expanduser(), Path(args.law))
    print(f"{args.law}: kept as {name}; the page draws it under Law", file=sys.stderr)
    return 0


def _tokens(args: argparse.Namespace) -> Any:
    from monitor.service.tokens import Tokens

    return Tokens(Path(args.store).expanduser())


def create(args: argparse.Namespace) -> int:
    """Print a new token, once."""
    from monitor.errors import WrongInput
    from monitor.service.tokens import parse_scopes

    if args.max_runs < 1:
        raise WrongInput(f"--max-runs {args.max_runs}: must be at least 1")
    secret = _tokens(args).create(parse_scopes(args.scope), args.name, args.max_runs)
    print("losscast: shown once, kept nowhere", file=sys.stderr)
    print(secret)
    return 0


def show(args: argparse.Namespace) -> int:
    """Print every token without its secret."""
    import json
    from datetime import UTC, datetime

    _store_there(args)
    found = _tokens(args).list()
    if args.json:
        print(
            json.dumps(
                [
                    {
                        "id": t.id,
                        "name": t.name,
                        "scopes": t.scopes,
                        "created": t.created,
                        "max_runs": t.max_runs,
                    }
                    for t in found
                ]
            )
        )
        return 0
    for t in found:
        made = datetime.fromtimestamp(t.created, UTC).strftime("%Y-%m-%d %H:%M")
        print(f"{t.id}  {made}  {','.join(t.scopes):24}  {t.name}")
    return 0


def revoke(args: argparse.Namespace) -> int:
    """Forget tokens by id or name."""
    from monitor.errors import WrongInput

    gone = _tokens(args).revoke(args.id)
    if not gone:
        raise WrongInput(f"{args.id}: no token has this id or name; `losscast monitor token list` shows them")
    print(f"{gone} revoked", file=sys.stderr)
    return 0


def backup(args: argparse.Namespace) -> int:
    """Copy the store to a file."""
    from monitor.store.backup import backup as run

    size = run(Path(args.store).expanduser(), Path(args.target))
    print(f"{args.target}: {size} bytes", file=sys.stderr)
    return 0


def restore(args: argparse.Namespace) -> int:
    """Put a backup in place."""
    from monitor.store.backup import restore as run

    run(Path(args.source), Path(args.store).expanduser())
    print(f"{args.store}: restored; tokens are not part of a backup", file=sys.stderr)
    return 0


def repair(args: argparse.Namespace) -> int:
    """Check, and repair where need be. Exit status 1 when something is lost."""
    from monitor.store.repair import repair as run

    said = run(Path(args.store).expanduser())
    for line in said:
        print(line)
    print(
        "a new store was written; the damaged one is kept beside it" if said else "nothing is wrong",
        file=sys.stderr,
    )
    return 1 if said else 0


def export(args: argparse.Namespace) -> int:
    """Write a run's samples."""
    from monitor.errors import WrongInput, writing
    from monitor.store.export import export as run

    target = Path(args.output) if args.output else None
    folder = target is not None and (args.output.endswith("/") or target.is_dir())
    if target is not None and not folder and target.suffix not in (".csv", ".parquet"):
        raise WrongInput(
            f"{target}: give a name that ends in .csv or .parquet, or in / for a folder of TensorBoard's"
        )
    if folder and target is not None and target.suffix:
        raise WrongInput(f"{target}: give a folder without a dot in its name")
    store = Path(args.store).expanduser()
    if target is None:
        count = run(store, args.run, None, sys.stdout)
    elif folder or target.suffix == ".parquet":
        with writing(target):
            count = run(store, args.run, target, sys.stdout)
    else:
        with writing(target), whole(target) as partial, partial.open("w", newline="") as out:
            count = run(store, args.run, target, out)
    print(f"{count} samples", file=sys.stderr)
    return 0


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A file to write in the target's place, which becomes the target when all went well: what was there stays otherwise."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
