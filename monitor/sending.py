"""Recorded samples to a live monitor, in batches, each sent until it is taken. Sent again they change nothing."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from monitor.errors import Failed, WrongInput
from monitor.schema import encode_event, event, run_started, sample

BATCH = 2000
TRIES = 30
RETRY_S = 1.0


def send(
    url: str,
    token: str,
    run: str,
    samples: Sequence[dict[str, Any]],
    *,
    prediction: dict[str, Any] | None = None,
    ended: bool = True,
    target_loss: float | None = None,
    team: str | None = None,
) -> dict[str, int]:
    """All of a run as attempt 1: how many events were accepted, and how many were there before.

    Raises WrongInput where the monitor can't use it, Failed where it can't be reached.
    """
    if not url.startswith(("http://", "https://")):
        raise WrongInput(f"--url {url}: give http://HOST:PORT")
    first, last = samples[0].get("time"), samples[-1].get("time")
    more = {"target_loss": target_loss, "team": team}
    head = run_started(
        run, 1, time=first or 0.0, prediction=prediction, imported=True, **{k: v for k, v in more.items() if v is not None}
    )  # fmt: skip
    total = {"accepted": 0, "duplicates": 0}
    batches = [encode_event(head)]
    for start in range(0, len(samples), BATCH):
        batches.append(
            b"".join(_line(run, start + i, row) for i, row in enumerate(samples[start : start + BATCH]))
        )
    if ended:
        batches.append(encode_event(event("run_ended", run, 1, time=last or 0.0, reason="imported")))
    for body in batches:
        said = _post(url, token, body)
        for name in total:
            total[name] += int(said.get(name, 0))
    return total


def _line(run: str, seq: int, row: dict[str, Any]) -> bytes:
    rest = {name: value for name, value in row.items() if name not in ("step", "loss", "time")}
    line = sample(run, 1, seq, step=row["step"], loss=row["loss"], time=row.get("time") or 0.0, **rest)
    if "time" not in row:
        del line["time"]
    return encode_event(line)


def _post(url: str, token: str, body: bytes) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/events", data=body, headers={"Authorization": f"Bearer {token}"}
    )
    why = ""
    for _ in range(TRIES):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            text = error.read()[:500].decode("utf-8", "replace")
            if error.code in (401, 403):
                raise Failed(f"{url}: {error.code}: {text}; a token with scope ingest is needed") from None
            if error.code not in (429, 503, 507):
                raise WrongInput(f"{url}: {error.code}: {text}") from None
            why = f"{error.code}: {text}"
        except (OSError, http.client.HTTPException) as error:
            why = str(getattr(error, "reason", error))
            raise Failed(f"{url}: {why}; is a monitor there?") from error
        time.sleep(RETRY_S)
    raise Failed(
        f"{url}: {why}; gave up after {TRIES} tries. Send it again: what was taken is not taken twice"
    )
