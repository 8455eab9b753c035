"""`losscast watch [RUN]`: the terminal view, over ssh or in a pane."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

URL = "http://127.0.0.1:8700"


def register(commands: Any) -> None:
    """Add `watch` to the command."""
    p = commands.add_parser(
        "watch",
        help="the terminal view of a monitor",
        description="Every run of a monitor, or one run's loss in its band, in the terminal. Leave with q "
        "or Ctrl-C. With RUN and --once the exit status is 3 while an alert that is no information stands.",
    )
    p.add_argument("run", nargs="?", metavar="RUN", help="a run's name; without it, all of them")
    where(p)
    p.add_argument("--once", action="store_true", help="print one frame and leave")
    p.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="between two frames (default %(default)s)"
    )
    p.set_defaults(func=watch)


def where(p: argparse.ArgumentParser) -> None:
    """The flags that say which monitor is asked, and with what."""
    p.add_argument("--url", help=f"the monitor (default $LOSSCAST_URL, or {URL})")
    p.add_argument(
        "--token-env",
        default="LOSSCAST_TOKEN",
        metavar="NAME",
        help="variable that holds a token (default %(default)s)",
    )


def asking(args: argparse.Namespace) -> Callable[..., Any]:
    """An `asker` of the monitor that the flags name."""
    url = (args.url or os.environ.get("LOSSCAST_URL") or URL).rstrip("/")
    return asker(url, token(args.token_env), args.token_env)


def token(variable: str) -> str:
    """The token in the variable; "" when it is not set. Raises WrongInput, which does not repeat what may be a token."""
    from monitor.errors import WrongInput

    if variable.startswith("lct_") or not variable.isidentifier():
        raise WrongInput(
            "--token-env: need the name of a variable, not a token, which others could read in the list of processes: "
            "export LOSSCAST_TOKEN=... and leave the flag out"
        )
    return os.environ.get(variable, "")


def watch(args: argparse.Namespace) -> int:
    """Print one frame, or one after another."""
    import shutil

    from monitor.errors import WrongInput
    from monitor.schema import is_run_id

    if args.run is not None and not is_run_id(args.run):
        raise WrongInput(
            f"{args.run!r} is no run's name: small letters, digits and hyphens, as in run.yaml's `name`"
        )
    if not args.every > 0:
        raise WrongInput(f"--every {args.every:g}: must be more than 0 seconds")
    ask = asking(args)
    size = shutil.get_terminal_size((80, 24))
    if args.once:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        lines, off = frame(ask, args.run, size.columns, size.lines, color)
        print("\n".join(lines))
        return 3 if args.run and off else 0
    if not sys.stdout.isatty():
        raise WrongInput("the output is no terminal; use --once for a single frame")
    return _live(ask, args.run, args.every)


def asker(url: str, token: str, token_env: str) -> Callable[..., Any]:
    """A function from an API path to its JSON. It raises WrongInput or Failed with what to do instead.

    ask(path)                  what is there
    ask(path, "POST", {...})   with something to say; None where there is no answer to it
    """
    import http.client
    import json
    import re
    import urllib.error
    import urllib.request

    from monitor.errors import Failed, WrongInput

    if not is_web_address(url):
        raise WrongInput(f"{url}: not a web address; give --url http://HOST:PORT")

    def ask(path: str, method: str = "GET", body: dict[str, Any] | None = None) -> Any:
        scope = "read" if method == "GET" else "ingest" if path == "/v1/events" else "operate"
        request = urllib.request.Request(
            url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return None if answer.status == 204 else json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 401:
                why = (
                    f"does not know the token in ${token_env}" if token else f"wants a token in ${token_env}"
                )
                how = f"`losscast monitor token create --store DIR --scope {scope}` makes one"
                raise WrongInput(f"{url}: the monitor {why}; {how}") from error
            if error.code == 403:
                raise WrongInput(
                    f"{url}: the token in ${token_env} may not {scope}; make one with --scope {scope}"
                ) from error
            if error.code == 404:
                run = re.match(r"/v1/runs/([^/?]+)", path)
                what = (
                    f"no run {run[1]}; `losscast runs` lists them" if run else f"has no {path.split('?')[0]}"
                )
                raise WrongInput(f"{url}: {what}") from error
            if error.code in (409, 422):
                try:
                    said = json.loads(error.read())["error"]
                except (ValueError, TypeError, KeyError, OSError, http.client.HTTPException):
                    said = f"status {error.code}"  # something between us and the monitor may have answered
                raise WrongInput(f"{url}: {said}") from error
            raise Failed(f"{url}{path}: the monitor answered {error.code}") from error
        except (http.client.InvalidURL, UnicodeEncodeError) as error:
            raise WrongInput(
                f"{url}: this address, or the token in ${token_env}, holds what no request can carry"
            ) from error
        except http.client.HTTPException as error:  # cut off, or no HTTP at all; OSError where nothing came
            raise Failed(
                f"{url}: the answer broke off or is not HTTP ({error!r:.100}); is this a losscast monitor?"
            ) from error
        except ValueError as error:
            raise Failed(f"{url}{path}: the answer is not JSON; is this a losscast monitor?") from error
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise Failed(
                f"{url}: no monitor answers ({reason}); `losscast monitor serve` starts one"
            ) from error

    return ask


def is_web_address(url: str) -> bool:
    """http or https with a host, and a port that is a number where there is one; nothing that a request can't carry."""
    import urllib.parse

    try:
        parts = urllib.parse.urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return whole and "@" not in parts.netloc and url.isprintable() and " " not in url


def frame(
    ask: Callable[[str], Any], run: str | None, width: int, height: int, color: bool
) -> tuple[list[str], bool]:
    """The lines of one frame, and whether an alert that is more than information stands."""
    from monitor.web.terminal import open_alerts, run_frame, runs_frame

    if run is None:
        runs = ask("/v1/runs")["runs"]
        off = any({"critical", "warning"} & set(open_alerts(r)) for r in runs)
        return runs_frame(runs, width=width, height=height, color=color), off
    detail = ask(f"/v1/runs/{run}")
    samples = ask(f"/v1/runs/{run}/samples?max=4000")["samples"]
    off = bool({"critical", "warning"} & set(open_alerts(detail)))
    return run_frame(detail, samples, width=width, height=height, color=color), off


def _live(ask: Callable[[str], Any], run: str | None, every_s: float) -> int:
    """Frames until q or Ctrl-C, on the terminal's other screen, which is left as it was found."""
    import shutil

    from monitor.errors import Failed

    shown = False
    with _keys() as pressed:
        try:
            while True:
                size = shutil.get_terminal_size((80, 24))
                try:
                    lines, _ = frame(ask, run, size.columns, size.lines - 1, "NO_COLOR" not in os.environ)
                except Failed as error:  # the monitor may come back
                    if not shown:
                        raise
                    lines = [f"{error}"[: size.columns], "trying again"]
                if not shown:
                    sys.stdout.write("\x1b[?1049h\x1b[?25l")
                    shown = True
                sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in lines) + "\x1b[J")
                sys.stdout.flush()
                if pressed(every_s) in ("q", "\x03"):
                    return 0
        except KeyboardInterrupt:
            return 0
        finally:
            if shown:
                sys.stdout.write("\x1b[?25h\x1b[?1049l")
                sys.stdout.flush()


def _keys() -> Any:
    """A context whose value waits for a key: seconds -> the key, or "" when none came."""
    import contextlib
    import select
    import time

    @contextlib.contextmanager
    def context() -> Iterator[Callable[[float], str]]:
        if not sys.stdin.isatty():

            def wait(seconds: float) -> str:
                time.sleep(seconds)
                return ""

            yield wait
            return
        import termios
        import tty

        before = termios.tcgetattr(sys.stdin)

        def key(seconds: float) -> str:
            return (
                os.read(sys.stdin.fileno(), 1).decode("latin-1")
                if select.select([sys.stdin], [], [], seconds)[0]
                else ""
            )

        try:
            tty.setcbreak(sys.stdin)
            yield key
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

    return context()
