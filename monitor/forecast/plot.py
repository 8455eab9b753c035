"""The law as a picture: loss against compute, both logarithmic, its band, the runs, and what is left over below.

The line is the law along the runs' own tokens per parameter (the median ratio, or its trend where it has one), up
to a hundred times their compute. For the loss at other ratios look at the residuals: those are each run's own.
"""

from pathlib import Path

import numpy as np

from monitor.errors import Failed, WrongInput
from monitor.forecast.law import Law
from monitor.forecast.law_view import law_view

_INK, _LINE, _OUT = "#1a1a2e", "#2a6f97", "#c1121f"


def draw_law(law: Law, path: str | Path, beyond: float = 100.0) -> None:
    """Draw a law to a PNG, SVG or PDF file. Raises Failed without matplotlib, WrongInput for another kind of file."""
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise WrongInput(f"--plot {path}: write to a .png, .svg or .pdf file")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Failed("--plot needs matplotlib: pip install 'losscast[plot]'") from None
    view = law_view(law, beyond=beyond)
    flops, loss, off = (np.array([run[k] for run in view["runs"]]) for k in ("flops", "loss", "off"))
    at, low, middle, high = (np.array(view["line"][k]) for k in ("flops", "p05", "p50", "p95"))
    sized = view["runs"][0]["params"] is not None and view["runs"][0]["tokens"] is not None

    figure = Figure(figsize=(7.0, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    inside = at <= flops.max()
    top.fill_between(at, low, high, color=_LINE, alpha=0.18, linewidth=0, label="90% interval")
    top.plot(at[inside], middle[inside], color=_LINE, linewidth=1.8, label="law")
    top.plot(
        at[~inside], middle[~inside], color=_LINE, linewidth=1.8, linestyle="--", label="beyond the runs"
    )
    top.scatter(flops, loss, s=18, color=_INK, zorder=3, label=f"{flops.size} runs")
    gone = [(e["flops"], e["loss"]) for e in law.excluded if e["flops"] is not None and e["loss"] is not None]
    if gone:
        top.scatter(
            *zip(*gone, strict=True), s=22, color=_OUT, marker="x", zorder=2, label=f"{len(gone)} left out"
        )
    top.set_xscale("log")
    top.set_yscale("log")
    ticks = _ticks(
        min(float(loss.min()), float(low.min())), max(float(np.quantile(loss, 0.99)), float(high.max()))
    )
    top.set_yticks(ticks, [f"{t:g}" for t in ticks])
    top.minorticks_off()
    top.set_ylabel("-ln(pass rate)" if (law.task or {}).get("metric") == "pass_rate" else "final loss")
    top.set_title(_title(law), fontsize=10, loc="left")
    top.legend(frameon=False, fontsize=8)

    off = 100 * off
    limit = max(1.0, 1.3 * float(np.quantile(np.abs(off), 0.95)))
    far = np.abs(off) > limit
    bottom.axhline(0, color=_LINE, linewidth=1)
    bottom.scatter(flops[~far], off[~far], s=12, color=_INK)
    bottom.scatter(
        flops[far],
        np.clip(off[far], -limit, limit),
        s=18,
        color=_OUT,
        marker="x",
        label=f"{far.sum()} further off",
    )
    if far.any():
        bottom.legend(frameon=False, fontsize=7)
    bottom.set_ylim(-1.1 * limit, 1.1 * limit)
    bottom.set_ylabel("off by, %")
    bottom.set_xlabel("training compute, FLOPs" if sized else "training compute")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, which="major", color="#dddddd", linewidth=0.5)
    figure.savefig(path, dpi=160)


def _ticks(low: float, high: float) -> list[float]:
    """Five or so round values between two, evenly spaced in the logarithm."""
    raw = np.geomspace(low, high, 6)
    digits = 2 if high / low > 1.3 else 3
    return sorted({float(f"{v:.{digits}g}") for v in raw})


def _title(law: Law) -> str:
    values = ", ".join(f"{k} {v:.3g}" for k, v in law.parameters.items() if k in ("E", "alpha", "beta", "b"))
    left = f"; {len(law.excluded)} left out" if law.excluded else ""
    unsure = "" if law.identifiable else "; not identifiable"
    form = {"eased": "frontier, small runs eased", "eased_valley": "valley, small runs eased"}.get(
        law.fit["best_form"], law.fit["best_form"]
    )
    return f"{form} ({values}){left}{unsure}"
