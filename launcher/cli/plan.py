"""`losscast plan`: what run.yaml would run, need, cost and reach, before anything starts."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def register(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "plan",
        help="what would run: DeepSpeed config, memory, hours, $, predicted loss",
        description="Show what a spec would run. Without --measure nothing is started, no machine is probed, no network is used.",
    )
    parser.add_argument("run", metavar="RUN", help="run.yaml")
    parser.add_argument("--law", metavar="LAW", help="law.json to predict from; default the spec's own")
    parser.add_argument(
        "--to", metavar="WHERE", help="plan for another place than the spec's: local, an address, kuberay"
    )
    parser.add_argument(
        "-o", "--output", choices=("text", "json", "yaml"), help="yaml: the manifests and nothing else"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="train three steps here, and print the measured peak memory beside the estimate",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(func=plan)


def plan(args: argparse.Namespace) -> int:
    """Print the plan."""
    from launcher.plan.plan import make_plan
    from launcher.plan.text import as_text
    from launcher.runspec.document import read_document
    from launcher.runspec.file import spec_in

    document = read_document(args.run)
    moved_to(document, args.to)
    spec = spec_in(document)
    if args.output == "yaml":
        return manifests(spec)
    answer = make_plan(spec)
    answer["warnings"] += absent_data(spec)
    law_path = args.law or (str(Path(args.run).parent / spec.law) if spec.law else None)
    if law_path:
        answer["warnings"] += check_law(document, spec, law_path)
        answer |= under_law(spec, law_path)
    if args.measure:
        from launcher.plan.measure import measured_peaks

        print("measuring: three steps of the real engine on this machine", file=sys.stderr)
        answer["measured_peak_bytes"] = measured_peaks(spec)
    if args.json or args.output == "json":
        from monitor.schema import spell

        print(json.dumps(spell(answer), indent=2, allow_nan=False))
    else:
        print(as_text(answer))
        for warning in answer["warnings"]:
            print(f"warning: {', '.join(warning['keys'])}: {warning['message']}", file=sys.stderr)
    return 0


def absent_data(spec: Any) -> list[dict[str, Any]]:
    """A warning where `submit` from this folder would refuse the data. At az:// it is not asked for: a plan needs no network."""
    from launcher.data.feed import refuse_unfit
    from launcher.data.tokens import cache_folder
    from launcher.errors import WrongInput

    if spec.data is not None and spec.data.path.startswith("az://"):
        return []
    try:
        refuse_unfit(spec, cache_folder())
    except WrongInput as error:
        said = str(error).removeprefix("data.path: ")
        return [{"keys": ["data.path"], "message": f"submit will refuse it, seen from {Path.cwd()}: {said}"}]
    return []


def moved_to(document: Any, to: str | None) -> None:
    """Have a spec's document name another place; None leaves it the one it has."""
    if to and isinstance(document.data, dict):
        cluster = document.data.get("cluster") or {}
        if isinstance(cluster, dict):  # anything else is the spec's own mistake, to be told
            document.data = {**document.data, "cluster": {**cluster, "to": to}}
            document.given["cluster.to"] = f"--to {to}"


def manifests(spec: Any) -> int:
    """Print the Kubernetes manifests of a run."""
    from launcher.errors import WrongInput

    if spec.cluster.to != "kuberay":
        raise WrongInput(
            f"cluster.to: {spec.cluster.to}: only kuberay has manifests. Add --to kuberay, or leave out -o yaml."
        )
    from launcher.kuberay.manifests import as_yaml
    from launcher.kuberay.manifests import manifests as rendered

    print(as_yaml(rendered(spec)), end="")
    return 0


def check_law(document: Any, spec: Any, path: str) -> list[dict[str, Any]]:
    """Warnings about a law's fitness for the run. Raises WrongInput where it speaks of something else."""
    from launcher.plan.lawcheck import doubts, mismatches
    from launcher.runspec.document import Complaint
    from monitor.errors import WrongInput
    from monitor.forecast.law import read_json

    try:
        read = read_json(path, "a law.json (`losscast fit` and `losscast ladder` make one)")
    except WrongInput as error:
        if (
            spec.law is not None and Path(path).name == Path(spec.law).name
        ):  # the spec named it, so it is told there
            raise document.refuse([Complaint.of("law", f"{error}.")]) from None
        raise
    said = read.get("conventions", {}) if isinstance(read, dict) else {}
    wrong = mismatches(spec, said, path)
    if wrong:
        raise document.refuse([Complaint.of(key, p.message) for p in wrong for key in p.keys])
    return [{"keys": list(p.keys), "message": p.message} for p in doubts(spec, said, path)]


def under_law(spec: Any, path: str) -> dict[str, Any]:
    """What a law says of the run: its final loss, and whether its size and data fit each other."""
    from launcher.runspec.accounting import parameter_count, total_flops, total_tokens
    from monitor.forecast.law import Law

    law, n = Law.read(path), parameter_count(spec)
    if n is None:
        print("no prediction: the model's parameters are unknown; set workload.params", file=sys.stderr)
        return {}
    tokens = total_tokens(spec)
    final = law.predict(n, tokens)
    flops = law.flops_of(n, tokens)
    smallest = law.range()["flops"][1]
    return {
        "prediction": {
            "final_loss": final.to_dict(),
            "identifiable": law.identifiable,
            "in_range": law.covers(n, tokens, flops),
            "extrapolation": {"flops_ratio": flops / smallest},
            "law": path,
            "law_digest": law.digest,
        },
        "optimal": optimal(law, n, tokens, total_flops(spec)),
    }


def optimal(law: Any, n: int, tokens: int, flops: float | None) -> dict[str, Any] | None:
    """The best N and D for the run's 6 N D under the law, and what the run's own choice costs in nats.

    None for a law that knows compute only. Searched over N from a hundredth to a hundred times the run's.
    """
    from monitor.errors import WrongInput

    best: tuple[float, float, float] | None = None
    here = law.predict(n, tokens).p50
    try:
        for i in range(-80, 81):
            size = n * 10 ** (i / 40)
            loss = law.predict(size, tokens * n / size).p50
            if best is None or loss < best[0]:
                best = (loss, size, tokens * n / size)
    except WrongInput:
        return None
    assert best is not None
    loss, size, data = best
    seen = law.range().get("params", [n, n])
    return {
        "params": size,
        "tokens": data,
        "final_loss": loss,
        "excess_nats": here - loss,
        "seen_by_law": seen[0] <= size <= seen[1],
        "is_optimal": here - loss < 0.002 * here,
        "flops": flops,
    }
