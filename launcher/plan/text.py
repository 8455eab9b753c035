"""A plan as text for a terminal. Pure: `launcher.plan.plan.make_plan`'s data in, lines out."""

import json
from typing import Any


def as_text(plan: dict[str, Any]) -> str:
    """The whole plan, most asked-for first."""
    lines = [f"{plan['run']}  ({plan['spec_digest'][:19]})  to {plan['to']}", ""]
    lines += [f"  {name:<13}{text}" for name, text in _rows(plan) if text]
    if plan["memory"]:
        lines += ["", *_memory(plan)]
    if plan["job"]:
        job, place = plan["job"]["submit_job"], plan["job"]["placement"]
        each = " + ".join(f"{n} {kind}" for kind, n in place["each"].items())
        lines += [
            "",
            "ray job",
            f"  {job['entrypoint']}",
            f"  placement group of {place['bundles']} x ({each})",
        ]
    if plan["manifests"]:
        lines += ["", *_manifests(plan["manifests"])]
    lines += ["", "deepspeed config"]
    lines += ["  " + line for line in json.dumps(plan["deepspeed"], indent=2).splitlines()]
    return "\n".join(lines)


def _manifests(objects: list[dict[str, Any]]) -> list[str]:
    """The RayJob in a few lines; `-o yaml` prints all of it."""
    lines = ["kubernetes objects, in full with -o yaml"]
    for each in objects:
        meta = each["metadata"]
        lines.append(f"  {each['kind']:<14} {meta['namespace']}/{meta['name']}")
        if each["kind"] != "RayJob":
            continue
        spec, labels = each["spec"], meta.get("labels", {})
        queue = labels.get("kueue.x-k8s.io/queue-name")
        lines.append(f"    entrypoint   {spec['entrypoint']}")
        if queue:
            lines.append(f"    queue        {queue}: suspended until Kueue lets all of it in")
        for group in spec["rayClusterSpec"].get("workerGroupSpecs", ()):
            limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
            holds = ", ".join(f"{v} {k}" for k, v in limits.items())
            lines.append(f"    workers      {group.get('replicas')} x ({holds})")
    return lines


SHORT = ("loss", "optimal", "parameters", "tokens", "ranks", "hours", "$", "failures", "checkpoints", "pacer",
         "monitor")  # fmt: skip


def summary(plan: dict[str, Any]) -> str:
    """What a person decides by, before a run is handed in: `losscast plan` shows the rest."""
    rows = [(name, text) for name, text in _rows(plan) if text and name in SHORT]
    if plan["memory"] and plan["gpu_memory_bytes"]:
        most = max(row["total"] for row in plan["memory"])
        rows.append(("memory", f"{size(most)} of a GPU's {size(plan['gpu_memory_bytes'])}"))
    lines = [f"{plan['run']}  ({plan['spec_digest'][:19]})  to {plan['to']}"]
    return "\n".join([*lines, *(f"  {name:<13}{text}" for name, text in rows)])


def _rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    batch, checkpoint = plan["batch"], plan["checkpoint"]
    return [
        ("loss", _loss(plan["prediction"])),
        ("optimal", _optimal(plan)),
        ("parameters", _parameters(plan)),
        ("tokens", f"{plan['tokens']:,} in {plan['steps']:,} steps" + _per_param(plan)),
        (
            "batch",
            f"{batch['tokens']:,} tokens = {batch['sequences']} sequences; a rank computes "
            f"{batch['micro_batch']} at once, {batch['accumulation']} times a step"
            if batch["sequences"]
            else f"{batch['tokens']:,} tokens; set workload.context to have them counted in sequences",
        ),
        ("ranks", f"{plan['ranks']} on " + (f"{plan['gpus']} GPUs" if plan["gpus"] else "CPU")),
        (
            "FLOPs",
            f"{plan['flops']:.3g} (6ND) + {plan['attention_flops']:.2g} attention" if plan["flops"] else "",
        ),
        ("hours", _hours(plan)),
        ("$", _dollars(plan)),
        ("failures", _failures(plan)),
        ("checkpoints", _checkpoints(checkpoint)),
        ("pacer", _pacer(plan)),
        ("monitor", _monitor(plan["monitor"])),
    ]


def _loss(prediction: dict[str, Any] | None) -> str:
    if prediction is None:
        return "no law: give one with --law, or `law:` in the spec"
    final = prediction["final_loss"]
    text = f"{final['p50']:.4f} nats/token ({final['p05']:.4f} to {final['p95']:.4f}, 90%)"
    notes = []
    if not prediction["in_range"]:
        notes.append(f"{prediction['extrapolation']['flops_ratio']:.3g} x the largest fitted compute")
    if not prediction["identifiable"]:
        notes.append("the law is not fully identified")
    return text + (f"; {', '.join(notes)}" if notes else "")


def _optimal(plan: dict[str, Any]) -> str:
    best = plan["optimal"]
    if best is None:
        return "this law knows compute alone: it says nothing of sizes" if plan["prediction"] else ""
    if best["is_optimal"]:
        return "yes, under this law: another size at the same compute gains less than 0.2%"
    beyond = (
        ""
        if best["seen_by_law"]
        else "; no run of the law was of that size: take the direction, not the figure"
    )
    return (
        f"no: {best['params']:.3g} parameters on {best['tokens']:.3g} tokens ({best['tokens'] / best['params']:.3g} a parameter) "
        f"would end at {best['final_loss']:.4f}, {best['excess_nats']:.4f} lower, for the same FLOPs{beyond}"
    )


def _parameters(plan: dict[str, Any]) -> str:
    if plan["params"] is None:
        return "unknown: set workload.params"
    parts = plan["params_by_part"]
    text = f"{plan['params']:,}"
    return text + (f" ({', '.join(f'{k} {v:,}' for k, v in parts.items() if v)})" if parts else "")


def _per_param(plan: dict[str, Any]) -> str:
    return f", {plan['tokens_per_param']:.3g} a parameter" if plan["tokens_per_param"] else ""


def _hours(plan: dict[str, Any]) -> str:
    if plan["hours"] is None:
        return "unknown" + (": set cluster.gpu to a known model" if plan["gpus"] and plan["params"] else "")
    best, worst = plan["hours"]["low"], plan["hours"]["high"]
    if worst * 60 < 1:
        return "under a minute"
    if worst < 2:
        return f"{best * 60:.3g} to {worst * 60:.3g} minutes"
    return f"{best:.3g} to {worst:.3g}"


def _dollars(plan: dict[str, Any]) -> str:
    if plan["dollars"]:
        return _span(plan["dollars"], ",.2f")
    return "unknown: set cluster.price_per_gpu_hour" if plan["gpus"] and plan["hours"] else ""


def _span(span: dict[str, float], form: str) -> str:
    return f"{span['low']:{form}} to {span['high']:{form}}"


def _failures(plan: dict[str, Any]) -> str:
    span = plan["hours_to_failure"]
    return f"one in {_span(span, '.3g')} hours expected" if span else ""


def _monitor(monitor: dict[str, Any] | None) -> str:
    if monitor is None:
        return "none: no loss is held against its prediction. Name one: monitor: {url: http://HOST:8700}"
    return monitor["url"]


def _pacer(plan: dict[str, Any]) -> str:
    pacer = plan["pacer"]
    if pacer is None:
        return ""
    if pacer["run"] is None:
        return f"none: {pacer['why']}"
    shape, dollars = pacer["shape"], _dollars(pacer)
    on = (
        f"{pacer['gpus']} GPU{'' if pacer['gpus'] == 1 else 's'}"
        if pacer["gpus"]
        else f"{pacer['ranks']} CPU ranks"
    )
    price = "; set cluster.price_per_gpu_hour for its price" if dollars.startswith("unknown") else ""
    return (
        f"{pacer['run']}: {pacer['params']:,} parameters ({shape['layers']} layers of {shape['width']}) on the same batches, "
        f"{on} beside the run's for {_hours(pacer)}{'' if 'minutes' in _hours(pacer) else ' hours'}"
        + (f", ${dollars}" if dollars and not price else "")
        + f": {pacer['flops'] + pacer['attention_flops']:.3g} FLOPs, {pacer['share']:.1%} of the run's{price}"
    )


def _checkpoints(checkpoint: dict[str, Any]) -> str:
    if checkpoint["count"] is None:
        return f"those that the script saves, to {checkpoint['url']}"
    if not checkpoint["bytes"]:
        return f"{checkpoint['count']} to {checkpoint['url']}"
    return (
        f"{checkpoint['count']} of {size(checkpoint['bytes'])} to {checkpoint['url']}, "
        f"{size(checkpoint['kept_bytes'])} kept"
    )


def _memory(plan: dict[str, Any]) -> list[str]:
    parts = (
        "parameters",
        "optimizer",
        "buffers",
        "gradients",
        "activations",
        "logits",
        "gathered",
        "reduce",
        "step",
    )
    rows = plan["memory"]
    if all(row == {**rows[0], "stage": row["stage"]} for row in rows):
        rows = rows[:1]
    where = "GPU" if plan["gpus"] else "rank"
    lines = [
        f"memory of one {where}"
        + (f" (of {size(plan['gpu_memory_bytes'])})" if plan["gpu_memory_bytes"] else "")
    ]
    lines.append("  stage " + "".join(f"{p:>13}" for p in (*parts, "total")))
    for row in rows:
        lines.append(f"  {row['stage']:>5} " + "".join(f"{size(row[p]):>13}" for p in (*parts, "total")))
    lines.append(
        "  total: the first three, and the most of backward (gradients to gathered), reduction (gradients, reduce) and step"
    )
    if not plan["activations_known"]:
        lines.append("  activations and logits of a model of your own are not known here, and come on top")
    if plan["measured_peak_bytes"]:
        peak, said = max(plan["measured_peak_bytes"]), max(row["total"] for row in rows)
        lines.append(f"  measured here: {size(peak)} on the largest rank, {said / peak:.0%} of it estimated")
    if any(row["host"] for row in rows):
        lines.append(f"  and {size(max(row['host'] for row in rows))} in host memory")
    return lines


def size(number: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= one:
            return f"{number / one:.3g} {unit}"
    return f"{number:.0f} B"
