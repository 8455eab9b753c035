"""The demo's acts, in order, and what each of them leaves for the page.

A ladder of tiny GPTs, a law, a prediction written down and hashed, the run it is about under the live monitor, and the
same run broken twice. Every run goes through `launcher.jobs.submit`; nothing is tuned to the seed.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.cli.demo_progress import Progress
from launcher.cli.demo_stage import Stage

EVAL_TOKENS = 131_072
KEPT = "with --keep DIR its logs stay in DIR/ray and DIR/runs"


@dataclass(frozen=True)
class Size:
    """How large a demo is. Widths of one-head, two-layer models; the target is at least 2.5 times the largest
    rung's parameters and 6 times its compute."""

    widths: tuple[int, ...]
    target: int
    tokens_per_param: int
    estimate_s: dict[str, float]
    """Seconds of each part on 2 cores, for the first guess of the time left."""


FULL = Size((8, 10, 12, 14, 18, 22), 38, 60, {"start": 10, "ladder": 130, "target": 110, "drills": 90})
QUICK = Size((6, 8, 10, 12), 22, 20, {"start": 10, "ladder": 45, "target": 25, "drills": 30})


def base_spec(size: Size, seed: int, runs: Path, monitor_url: str) -> dict[str, Any]:
    """What every run of the demo shares, as a run.yaml would say it.

    The context is short on purpose: at these sizes a long one is of use only late in training and only to the larger
    models, which bends the law that the smaller ones show. The recipe was chosen on other seeds than are reported.
    """
    return {
        "workload": {"kind": "gpt", "layers": 2, "heads": 1, "context": 32},
        "data": {"path": "stdlib", "holdout_tokens": EVAL_TOKENS},
        "train": {
            "batch_tokens": 512,
            "lr": 0.02,
            "lr_base_width": 16,
            "schedule": {"kind": "linear"},
            "optimizer": {"weight_decay": 0.0},
            "precision": "fp32",
            "seed": seed,
        },
        "parallel": {"dp": 2, "zero": 1, "micro_batch": 8},
        "cluster": {"to": "local"},
        "checkpoints": {"url": str(runs), "every_steps": 1000},
        "monitor": {"url": monitor_url},
    }


def spec_of(base: dict[str, Any], name: str, width: int, size: Size, **policy: Any) -> Any:
    """One run of the demo: `width` wide, tokens in proportion to its parameters, a twentieth of them warm-up."""
    from launcher.jobs.ladder import merged
    from launcher.runspec.accounting import parameter_count
    from launcher.runspec.model import RunSpec

    probe = merged(base, {"name": name, "workload": {"width": width}, "train": {"tokens": 512}})
    params = parameter_count(RunSpec.from_dict(probe))
    assert params is not None
    steps = max(1, round(size.tokens_per_param * params / 512))
    return RunSpec.from_dict(
        merged(
            probe,
            {
                "train": {"tokens": steps * 512, "schedule": {"warmup_tokens": max(1, steps // 20) * 512}},
                "checkpoints": {"every_steps": max(1, -(-steps // 4))},
                "policy": policy,
            },
        )
    )


def story(seed: int, size: Size, stage: Stage, work: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """Play every act and return what the page shows (`monitor.web.report` names the fields)."""
    progress = Progress(size.estimate_s)
    base = _start(stage, size, seed, work, progress)
    ladder = _ladder(stage, base, size, work, progress)
    law, prediction, target = _predict(base, size, seed, ladder, work, progress)
    shown = _target(stage, target, prediction, work, progress)
    drills = _drills(stage, base, size, target, prediction, progress)
    progress.phase("end")
    return {
        "title": "losscast demo",
        "made_at": time.time(),
        "seed": seed,
        "machine": dict(machine),
        "seconds": {k: round(v, 1) for k, v in progress.spent.items()},
        "ladder": ladder,
        "law": {
            "form": law.form,
            "parameters": law.to_dict()["parameters"],
            "identifiable": law.identifiable,
            "line": _line(law, ladder, shown["params"], shown["tokens"]),
        },
        "target": shown,
        "drills": drills,
        "commands": NEXT,
    }


NEXT = [
    {
        "command": "losscast demo --seed 1 --keep demo-1",
        "what": "Another seed: other weights, another order of the text. Everything stays in demo-1.",
    },
    {
        "command": "losscast fit demo-1/points.csv --curves demo-1/curves.csv -o law.json",
        "what": "Fit the kept ladder again, or your own points file.",
    },
    {
        "command": "losscast replay demo-1/runs/target/attempts/1/curve.csv --prediction demo-1/prediction.json",
        "what": "Hold a recorded run against a prediction, with the judge that was live here.",
    },
    {"command": "losscast validate examples/gpt-125m.yaml", "what": "Start from a spec of your own."},
]


def _start(stage: Stage, size: Size, seed: int, work: Path, progress: Progress) -> dict[str, Any]:
    """Put the stage up; returns what every run's spec shares."""
    progress.phase("start")
    progress.say("1. The monitor, a local Ray with token auth, and Prometheus where there is one")
    progress.show("starting", 0.0)
    stage.start(cpus=4)
    os.environ["LOSSCAST_TOKEN"] = stage.monitor.token
    os.environ.setdefault("LOSSCAST_CACHE", str(work / "cache"))
    prometheus = (
        f"Prometheus {stage.prometheus.url}"
        if stage.prometheus
        else "no prometheus binary here: /metrics is checked instead"
    )
    progress.say(f"   monitor {stage.monitor.url}, Ray {stage.head.dashboard}, {prometheus}")
    return base_spec(size, seed, work / "runs", stage.monitor.url)


def _ladder(
    stage: Stage, base: dict[str, Any], size: Size, work: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Train the rungs; returns them as points and writes points.csv and curves.csv."""
    from launcher.data.tokens import cache_folder, tokens_for
    from launcher.errors import Failed
    from launcher.jobs.climbing import RayPlace, result_of, run_ladder, standing, write_points

    corpus = tokens_for("stdlib", cache_folder())
    specs = [spec_of(base, f"ladder-w{w}", w, size) for w in size.widths]
    total = sum(s.total_steps for s in specs)
    progress.phase("ladder")
    progress.say(
        f"2. A ladder of {len(specs)} GPTs on {corpus.train.size / 1e6:.1f} MB of Python source: "
        f"Ray jobs, DeepSpeed ZeRO-1 on two ranks"
    )

    def tick(rungs: list[Any]) -> None:
        steps = sum(min(r.step, r.spec.total_steps) for r in rungs)
        flying = ", ".join(
            f"{r.spec.name} {r.step}/{r.spec.total_steps}" for r in rungs if r.state == "running"
        )
        progress.show(flying or "ladder", steps / total)

    rungs = run_ladder(
        standing(specs), RayPlace(stage.head.dashboard, stage.head.environment()), at_once=3, tick=tick
    )
    failed = [r.spec.name for r in rungs if r.state != "finished"]
    if failed:
        raise Failed(f"the ladder's {', '.join(failed)} did not finish; {KEPT}")
    write_points(rungs, work / "points.csv", work / "curves.csv")
    rows = [result_of(r) for r in rungs]
    for row in rows:
        progress.say(
            f"   {row['run']}: {row['params']:,} parameters, {row['tokens'] / 1e6:.2f}M tokens, "
            f"validation loss {row['loss']:.4f}"
        )
    return rows


def _predict(
    base: dict[str, Any], size: Size, seed: int, ladder: list[dict[str, Any]], work: Path, progress: Progress
) -> tuple[Any, dict[str, Any], Any]:
    """Fit the law and write the prediction down, before the target exists. Returns law, prediction.json, target spec."""
    from launcher.runspec.accounting import parameter_count, total_flops, total_tokens
    from monitor.forecast.fit import fit
    from monitor.forecast.points import read_curves, read_points
    from monitor.forecast.prediction import predict

    progress.phase("fit")
    law = fit(
        read_points(work / "points.csv"),
        curves=read_curves(work / "curves.csv"),
        conventions={"params": "embeddings included", "loss": "nats per token", "tokenizer": "bytes"},
        seed=seed,
    )
    law.write(work / "law.json")
    target = spec_of(base, "target", size.target, size)
    params, tokens = float(parameter_count(target) or 0), float(total_tokens(target))
    made = predict(law, params=params, tokens=tokens, batch_tokens=float(target.train.batch_tokens))
    made.write(work / "prediction.json")
    prediction = made.to_dict()
    q, largest = prediction["final_loss"], max(ladder, key=lambda r: r["flops"])
    progress.say(
        f"3. Predicted, before the target starts: {q['p50']:.4f} (90% interval {q['p05']:.4f} to {q['p95']:.4f}) "
        f"for {params:,.0f} parameters, {params / largest['params']:.2f} times the largest rung's, "
        f"and {(total_flops(target) or 0) / largest['flops']:.1f} times its compute\n   {prediction['digest']}"
    )
    return law, prediction, spec_of(base, "target", size.target, size, target_loss=round(q["p95"], 4))


def _target(
    stage: Stage, target: Any, prediction: dict[str, Any], work: Path, progress: Progress
) -> dict[str, Any]:
    """Train the run that was predicted, and hold what came out against what was said."""
    from launcher.errors import Failed
    from launcher.jobs.submit import submit, wait
    from launcher.runspec.accounting import parameter_count, total_flops, total_tokens
    from launcher.storage.runfolder import RunFolder, read_json

    progress.phase("target")
    progress.say("4. The target, under the live monitor")
    env = stage.head.environment()
    job = submit(target, stage.head.dashboard, env, prediction=prediction)
    wait([job], env, lambda states: _show(progress, stage, target))
    result = read_json(RunFolder(Path(job.folder)).result)
    if result is None:
        raise Failed(f"the target did not finish; {KEPT}")
    q, actual = prediction["final_loss"], result["loss"]
    error = 100 * (q["p50"] / actual - 1)
    inside = q["p05"] <= actual <= q["p95"]
    alerts = (stage.monitor.get("/v1/runs/target") or {}).get("alerts", [])
    progress.say(
        f"   predicted {q['p50']:.4f}, actual {actual:.4f}: {abs(error):.2f}% too {'high' if error > 0 else 'low'}, "
        f"{'inside' if inside else 'OUTSIDE'} the 90% interval; alerts on this healthy run: {len(alerts)}"
    )
    return {
        "run": "target",
        "params": parameter_count(target),
        "tokens": total_tokens(target),
        "flops": total_flops(target),
        "predicted": q,
        "actual": actual,
        "error_percent": error,
        "inside": inside,
        "prediction_digest": prediction["digest"],
        "prediction_made_at": prediction["made_at"],
        "curve": prediction["curve"],
        "samples": _samples(stage, "target"),
        "alerts": alerts,
    }


def _show(progress: Progress, stage: Stage, spec: Any) -> None:
    """One look at a live run: what the monitor holds of it."""
    seen = stage.monitor.get(f"/v1/runs/{spec.name}") or {}
    step, loss, expected = seen.get("step") or 0, seen.get("loss"), seen.get("expected")
    words = f"{spec.name} {step}/{spec.total_steps}"
    if isinstance(loss, float):
        line = f", expected {expected:.3f}" if isinstance(expected, float) else ""
        words += f", loss {loss:.3f}{line}, {seen.get('state')}"
    progress.show(words, step / spec.total_steps)


def _samples(stage: Stage, run: str) -> list[list[Any]]:
    found = stage.monitor.get(f"/v1/runs/{run}/samples") or {"samples": []}
    return [[s["step"], s["loss"]] for s in found["samples"]]


def _line(law: Any, ladder: list[dict[str, Any]], params: float, tokens: float) -> dict[str, list[float]]:
    """The law along the ladder's own direction, from below its smallest run to beyond the target."""
    low = min(r["params"] for r in ladder) * 0.8
    ratio = (params * 1.25 / low) ** (1 / 40)
    out: dict[str, list[float]] = {"flops": [], "p05": [], "p50": [], "p95": []}
    for i in range(41):
        n = low * ratio**i
        q = law.predict(n, n * tokens / params)
        out["flops"].append(6 * n * n * tokens / params)
        for key in ("p05", "p50", "p95"):
            out[key].append(float(getattr(q, key)))
    return out


@dataclass
class Broken:
    """One drill under way."""

    title: str
    what: str
    spec: Any
    job: Any
    step: int = 0
    ended: bool = False
    in_metrics: bool = False
    fired: set[str] = field(default_factory=set)
    """Alerts of this run that were seen firing in Prometheus."""


def _drills(
    stage: Stage,
    base: dict[str, Any],
    size: Size,
    target: Any,
    prediction: dict[str, Any],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Break the target twice, side by side; each run is ended some steps after it was called, having no more to show."""
    from launcher.jobs.submit import submit
    from launcher.training.drill import VARIABLE

    half = target.total_steps // 2
    after = max(60, target.total_steps // 16)
    progress.phase("drills")
    progress.say(f"5. The same run again, broken on purpose at step {half}: learning rate x 30, and a NaN")
    plans = (
        ("target-lr30", "Learning rate x 30", f"From step {half} on, the learning rate is 30 times the schedule's.", f"lr*30@{half}"),
        ("target-nan", "NaN", f"At step {half} the loss, and with it every gradient, becomes NaN.", f"nan@{half}"),
    )  # fmt: skip
    drills = []
    for name, title, what, drill in plans:
        spec = spec_of(base, name, size.target, size, target_loss=target.policy.target_loss)
        job = submit(
            spec,
            stage.head.dashboard,
            stage.head.environment(),
            prediction=prediction,
            env={VARIABLE: drill},
        )
        drills.append(Broken(title, what, spec, job))
    while not all(d.ended for d in drills):
        for drill in drills:
            _look(stage, drill, half, after)
        done = sum(min(d.step, half + after) for d in drills) / (2 * (half + after))
        progress.show(", ".join(f"{d.spec.name} {d.step}" for d in drills), min(1.0, done))
        time.sleep(0.5)
    return [_called(stage, drill, half, progress) for drill in drills]


def _look(stage: Stage, drill: Broken, half: int, after: int) -> None:
    """See how a drill stands, and end it when it was called, or when it has had eight times the time to be."""
    from launcher.jobs.submit import ENDED, end_job, status
    from launcher.storage.runfolder import RunFolder, last_step

    if drill.ended:
        return
    name, env = drill.spec.name, stage.head.environment()
    folder = RunFolder(Path(drill.job.folder))
    drill.step = last_step(folder, max(folder.attempts(), default=1))
    alerts = (stage.monitor.get(f"/v1/runs/{name}") or {}).get("alerts", [])
    critical = [a for a in alerts if a["severity"] == "critical"]
    if stage.prometheus:
        drill.fired |= {a["alertname"] for a in stage.prometheus.firing() if a.get("run") == name}
    if critical and not drill.in_metrics:
        drill.in_metrics = f'run="{name}"' in stage.monitor.metrics()
    told = bool(drill.fired) or stage.prometheus is None
    shown = bool(critical) and told and drill.step >= critical[0]["step"] + after
    if shown or drill.step >= half + 8 * after or status(drill.job, env) in ENDED:
        drill.ended = True
        end_job(drill.job, env)


def _called(stage: Stage, drill: Broken, half: int, progress: Progress) -> dict[str, Any]:
    """What became of a drill, said and returned."""
    name = drill.spec.name
    alerts = (stage.monitor.get(f"/v1/runs/{name}") or {}).get("alerts", [])
    mine = sorted((a for a in alerts if a["step"] >= half), key=lambda a: a["step"])
    first = next(iter(mine), None)
    page = next((a for a in mine if a["severity"] == "critical"), None)
    words = "was not called"
    if first is not None:
        words = f"called at step {first['step']}, {first['step'] - half} steps after ({first['alert']}, {first['severity']})"
    if page is not None and page is not first:
        words += f"; paged at step {page['step']}, {page['step'] - half} steps after ({page['alert']})"
    if stage.prometheus:
        words += f"; in Prometheus: {', '.join(sorted(drill.fired)) or 'nothing fired'}"
    else:
        words += f"; /metrics {'shows' if drill.in_metrics else 'does not show'} the run"
    early = len(alerts) - len(mine)
    progress.say(f"   {drill.title}: {words}" + (f"; {early} alerts before the fault" if early else ""))
    return {
        "name": drill.title,
        "run": name,
        "what": drill.what,
        "fault_step": half,
        "called_step": None if first is None else first["step"],
        "alert": None if first is None else first["alert"],
        "severity": None if first is None else first["severity"],
        "paged_step": None if page is None else page["step"],
        "samples": _samples(stage, name),
        "alerts": alerts,
        "prometheus": {"fired": bool(drill.fired), "alerts": sorted(drill.fired)}
        if stage.prometheus
        else None,
        "metrics": drill.in_metrics,
    }
