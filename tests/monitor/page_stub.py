"""A stand-in for the monitor's API over made-up runs: the shapes the page reads, and nothing of the service.

For tests of the page alone. The service's own tests drive the real one.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from monitor.web import static_routes
from tests.monitor.made_up_runs import curve, diverged, loss_at, samples

TOKEN = "made-up-token"


def made_up(hostile: str = "", million: int = 0) -> dict[str, dict[str, Any]]:
    """Runs by name: `detail` as GET /v1/runs/{run} answers it, `samples` as rows."""
    now = time.time()
    final = {"p05": 2.06, "p50": 2.118, "p95": 2.19}
    runs = {}

    def add(
        name: str,
        rows: Sequence[Sequence[Any]],
        state: str,
        phase: str,
        alerts: list[dict[str, Any]],
        predicted: bool = True,
        **more: Any,
    ) -> None:
        started = now - len(rows) * 1.2 - 30
        table = []
        for step, loss in rows:
            expected = loss_at(int(step)) if predicted else None
            gap = None if expected is None or isinstance(loss, str) else (loss - expected) / 0.05
            table.append(
                {
                    "step": step,
                    "loss": loss,
                    "tokens": step * 512.0,
                    "time": started + step * 1.2,
                    "lr": 1e-3,
                    "attempt": 1,
                    "val_loss": None if step % 500 else (loss_at(int(step)) + 0.02),
                    "grad_norm": 0.8,
                    "tokens_per_s": 427.0,
                    "expected": expected,
                    "lower": expected and expected * 0.965,
                    "upper": expected and expected * 1.0385,
                    "gap_sigma": gap,
                }
            )
        last = table[-1] if table else {}
        runs[name] = {
            "detail": {
                "run": name,
                "team": f"pretraining{hostile}",
                "state": state,
                "phase": phase,
                "step": last.get("step", 0),
                "tokens": last.get("tokens", 0),
                "total_tokens": 3000 * 512.0,
                "loss": last.get("loss"),
                "expected": last.get("expected"),
                "predicted_final": final if predicted else None,
                "since_step": alerts[0]["since_step"] if alerts else None,
                "started_time": started,
                "last_time": last.get("time", now),
                "attempt": 1,
                "alerts": alerts,
                "target_loss": 2.15,
                "advice": {
                    "step": last.get("step", 0),
                    "action": "stop" if state == "diverged" else "continue",
                    "p_miss": 0.97 if state == "diverged" else 0.08,
                    "final_loss": final,
                    "evidence": [
                        f"smoothed loss is 0.4 sigma above its line{hostile}",
                        "the interval's upper end is above the target",
                    ],
                    "hours_left": 3.4,
                    "money_left": 1280.0,
                },
                "prediction": {
                    "final_loss": final,
                    "curve": curve(),
                    "params": 71.4e3,
                    "tokens": 3000 * 512.0,
                    "digest": "8f3c" * 16,
                    "made_at": f"2026-11-22T10:00:00Z{hostile}",
                    "identifiable": False,
                    "in_range": False,
                }
                if predicted
                else None,
                "attempts": [{"attempt": 1, "resume_step": 0, "started_time": started}],
                "events": [],
                **more,
            },
            "samples": table,
        }

    add("gpt-71k-target", samples(until=1740), "healthy", "running", [])
    add(
        "gpt-71k-lr-x30",
        diverged(),
        "diverged",
        "running",
        [
            {
                "alert": f"LossOffLine{hostile}",
                "severity": "warning",
                "step": 1504,
                "since_step": 1501,
                "value": 2.71,
                "expected": 2.31,
                "resolved_step": 1509,
            },
            {
                "alert": f"LossDiverged{hostile}",
                "severity": "critical",
                "step": 1509,
                "since_step": 1501,
                "value": 3.02,
                "expected": 2.31,
                "resolved_step": None,
            },
        ],
    )
    add("gpt-28k-ladder", samples(seed=4, drift=0.2), "healthy", "ended", [])
    add(
        "gpt-71k-nan",
        [*samples(seed=5, until=1200), *[[s, "NaN"] for s in range(1201, 1212)]],
        "non_finite",
        "running",
        [
            {
                "alert": "LossNonFinite",
                "severity": "critical",
                "step": 1201,
                "since_step": 1201,
                "value": "NaN",
                "expected": 2.35,
                "resolved_step": None,
            }
        ],
    )
    add("no-prediction-yet", samples(seed=8, until=600), "warming_up", "running", [], predicted=False)
    add("waiting-for-gpus", [], "warming_up", "waiting", [], predicted=False)
    add(
        "resumed",
        samples(seed=9, until=2100),
        "above",
        "running",
        [
            {
                "alert": "LossAbovePrediction",
                "severity": "warning",
                "step": 1900,
                "since_step": 1480,
                "value": 2.33,
                "expected": 2.28,
                "resolved_step": None,
            }
        ],
        attempt=2,
        attempts=[
            {"attempt": 1, "resume_step": 0, "started_time": now - 4000},
            {"attempt": 2, "resume_step": 1000, "started_time": now - 1500},
        ],
    )
    if million:
        detail = {
            **runs["gpt-71k-target"]["detail"],
            "run": "a-million",
            "step": million,
            "total_tokens": None,
        }
        runs["a-million"] = {"detail": {**detail, "prediction": None}, "samples": Million(million)}
    return runs


class Million:
    """Very many samples as arrays, with one spike of a single step at `spike`."""

    def __init__(self, n: int) -> None:
        self.spike = n * 5 // 8 + 123
        self.steps = np.arange(1, n + 1)
        self.loss = 2 + 3.6 / (1 + self.steps / 14) ** 0.3 + np.random.default_rng(0).normal(0, 0.01, n)
        self.loss[self.spike - 1] = 3.75

    def between(self, low: float, high: float, most: int) -> tuple[list[dict[str, Any]], bool]:
        """Samples from step `low` to `high`; past `most` each bucket's lowest and highest."""
        first, last = max(0, int(max(low, 1)) - 1), int(min(high, len(self.steps)))
        index = np.arange(first, last)
        if most and len(index) > most:
            size = -(-2 * len(index) // most)
            buckets = np.array_split(index, np.arange(size, len(index), size))
            mean = {
                i: float(self.loss[b].mean())
                for b in buckets
                for i in (b[self.loss[b].argmin()], b[self.loss[b].argmax()])
            }
            kept = sorted(mean)
        else:
            mean, kept = {}, index.tolist()
        rows = [
            {
                "step": int(i) + 1,
                "loss": float(self.loss[i]),
                "tokens": 512.0 * (int(i) + 1),
                "time": 1.0 * int(i),
                "mean": mean.get(i),
            }
            for i in kept
        ]
        return rows, len(kept) < len(index)


def thinned(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Each bucket's lowest and highest loss, in order of step."""
    if len(rows) <= most:
        return rows
    size = -(-2 * len(rows) // most)
    kept = []
    for start in range(0, len(rows), size):
        bucket = [r for r in rows[start : start + size]]
        finite = [r for r in bucket if isinstance(r["loss"], float)]
        picked = {id(r): r for r in bucket if r not in finite}
        if finite:
            picked |= {
                id(r): r for r in (min(finite, key=lambda r: r["loss"]), max(finite, key=lambda r: r["loss"]))
            }
        kept += sorted(picked.values(), key=lambda r: r["step"])
    return kept


def made_up_law() -> dict[str, Any]:
    """A law as `monitor.forecast.law_view` gives it."""
    flops = [1e10 * 1.6**k for k in range(20)]
    loss = [2.2 * (c / 1e10) ** -0.05 for c in flops]
    ladder = [
        {"run": f"ladder-{k}", "params": 4000.0 * 2**k, "tokens": 2.4e5 * 2**k, "flops": flops[k], "loss": loss[k] * 1.01,
         "fitted": loss[k], "off": 0.01}
        for k in range(6)
    ]  # fmt: skip
    return {
        "form": "frontier", "digest": "ab" * 32, "parameters": {"a": 5.1, "b": 0.05}, "standard_errors": {"a": 0.2, "b": 0.01},
        "identifiable": False, "why": ["the floor"], "excluded": [], "runs": ladder, "predictions": [],
        "line": {"flops": flops, "p05": [0.97 * v for v in loss], "p50": loss, "p95": [1.03 * v for v in loss], "fitted_to": flops[5]},
    }  # fmt: skip


def app(runs: dict[str, dict[str, Any]]) -> Starlette:
    """The stand-in; sign in with TOKEN. `app.state.runs` may be changed while it serves."""
    cookie = secrets.token_hex(8)

    def signed_in(request: Request) -> bool:
        bearer = request.headers.get("authorization") == f"Bearer {TOKEN}"
        return bearer or request.cookies.get("losscast") == cookie

    def guarded(answer: Any) -> Any:
        async def inner(request: Request) -> Response:
            return await answer(request) if signed_in(request) else JSONResponse({"error": "no token"}, 401)

        return inner

    def summary(detail: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in detail.items() if k not in ("prediction", "attempts", "events")} | {
            "alerts": [a for a in detail["alerts"] if a["resolved_step"] is None]
        }

    async def session(request: Request) -> Response:
        if request.method == "DELETE":
            answer = Response(status_code=204)
            answer.delete_cookie("losscast")
            return answer
        if (await request.json()).get("token") != TOKEN:
            return JSONResponse({"error": "unknown token"}, 401)
        answer = Response(status_code=204)
        answer.set_cookie("losscast", cookie, httponly=True, samesite="strict")
        return answer

    async def listed(request: Request) -> Response:
        return JSONResponse({"runs": [summary(r["detail"]) for r in runs.values()]})

    async def one(request: Request) -> Response:
        found = runs.get(request.path_params["run"])
        return JSONResponse(found["detail"]) if found else JSONResponse({"error": "no such run"}, 404)

    async def sampled(request: Request) -> Response:
        found = runs.get(request.path_params["run"])
        if not found:
            return JSONResponse({"error": "no such run"}, 404)
        query = request.query_params
        low, high, most = (
            float(query.get("from", "-inf")),
            float(query.get("to", "inf")),
            int(query.get("max", "0")),
        )
        if isinstance(found["samples"], Million):
            rows, cut = found["samples"].between(low, high, most)
            return JSONResponse({"samples": rows, "thinned": cut})
        if query.get("attempt") == "1" and found["detail"]["attempt"] == 2:
            rows = [{**r, "loss": r["loss"] + 0.1} for r in found["samples"] if low <= r["step"] <= 1400]
        else:
            rows = [r for r in found["samples"] if low <= r["step"] <= high]
        kept = thinned(rows, most) if most else rows
        return JSONResponse({"samples": kept, "thinned": len(kept) < len(rows)})

    async def laws(request: Request) -> Response:
        return JSONResponse({"laws": [made_up_law()]})

    async def stream(request: Request) -> Response:
        async def tell() -> AsyncIterator[str]:
            yield "retry: 500\n\n"
            while not await request.is_disconnected():
                for r in runs.values():
                    yield f"data: {json.dumps(summary(r['detail']))}\n\n"
                await asyncio.sleep(0.5)

        return StreamingResponse(tell(), media_type="text/event-stream")

    made = Starlette(
        routes=[
            *static_routes(),
            Route("/session", session, methods=["POST", "DELETE"]),
            Route("/v1/runs", guarded(listed)),
            Route("/v1/laws", guarded(laws)),
            Route("/v1/runs/{run}", guarded(one)),
            Route("/v1/runs/{run}/samples", guarded(sampled)),
            Route("/v1/stream", guarded(stream)),
        ]
    )
    made.state.runs = runs
    return made
