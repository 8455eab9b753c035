"""The demo's result as one picture: the law with the target on it, the target in its band, the drills.

Light background, 1600 x 1000 pixels. Colours are Okabe and Ito's, the same as the page's. Needs matplotlib,
which comes with `pip install 'losscast[plot]'`.
"""

import math
from pathlib import Path
from typing import Any

from monitor.schema import unspell
from monitor.web.words import count

INK, MUTED, GRID, PREDICTED, BAD, WARN = "#15181c", "#59626d", "#e9e7e0", "#0072b2", "#b23c00", "#835600"


def report_png(data: dict[str, Any], path: Path | str) -> None:
    """Draw the report's figures into a PNG file. `data` as for `report_html`.

    Raises ImportError where matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "font.family": "sans-serif",
        "font.size": 10.5,
        "axes.edgecolor": "#c9c6bd",
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": INK,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "figure.facecolor": "white",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(16, 10), dpi=100)
        drills = data["drills"][:2]
        grid = figure.add_gridspec(
            2,
            4,
            height_ratios=(1.35, 1) if drills else (1, 0.001),
            left=0.055,
            right=0.975,
            top=0.845,
            bottom=0.07,
            hspace=0.36,
            wspace=0.42,
        )
        _title(figure, data)
        _law(figure.add_subplot(grid[0, :2]), data)
        _target(figure.add_subplot(grid[0, 2:]), data)
        for index, drill in enumerate(drills):
            place = grid[1, :] if len(drills) == 1 else grid[1, 2 * index : 2 * index + 2]
            _drill(figure.add_subplot(place), drill, data["target"].get("curve"))
        figure.savefig(path, dpi=100)


def _title(figure: Any, data: dict[str, Any]) -> None:
    target = data["target"]
    predicted, actual, error = target["predicted"], target.get("actual"), target.get("error_percent")
    big = f"Predicted {predicted['p50']:.4f} before its first step"
    big += f", ended at {_number(actual):.4f}" if actual is not None else ""
    figure.text(0.055, 0.945, big, fontsize=23, fontweight="bold", color=INK, va="center")
    small = f"{len(data['ladder'])} small runs, one law, one run at "
    largest = max(run["flops"] for run in data["ladder"])
    small += f"{target['flops'] / largest:.1f} times the compute of the largest. "
    if error is not None:
        small += f"Predicted {abs(error):.1f}% too {'high' if error > 0 else 'low'}; "
        small += f"the actual loss is {'inside' if target['inside'] else 'outside'} the 90% interval "
        small += f"{predicted['p05']:.4f} to {predicted['p95']:.4f}."
    figure.text(0.055, 0.902, small, fontsize=13, color=MUTED, va="center")


def _law(axes: Any, data: dict[str, Any]) -> None:
    target, ladder, line = data["target"], data["ladder"], data["law"].get("line")
    axes.set(
        xscale="log", yscale="log", xlabel="training compute, FLOPs", ylabel="validation loss, nats per token"
    )
    axes.set_title("The law, and where it pointed")
    if line:
        axes.fill_between(
            line["flops"], line["p05"], line["p95"], color=PREDICTED, alpha=0.16, lw=0, label="90% interval"
        )
        axes.plot(line["flops"], line["p50"], color=PREDICTED, lw=1.6, ls=(0, (5, 3)), label="law")
    x, y = [run["flops"] for run in ladder], [run["loss"] for run in ladder]
    axes.plot(x, y, "o", mfc="white", mec=INK, mew=1.8, ms=8, label="ladder", zorder=4)
    predicted = target["predicted"]
    arms = [[predicted["p50"] - predicted["p05"]], [predicted["p95"] - predicted["p50"]]]
    axes.errorbar(
        [target["flops"]],
        [predicted["p50"]],
        yerr=arms,
        fmt="D",
        mfc="white",
        mec=PREDICTED,
        mew=1.8,
        ms=8,
        ecolor=PREDICTED,
        elinewidth=1.8,
        capsize=5,
        label="predicted",
        zorder=5,
    )
    if target.get("actual") is not None:
        axes.plot(
            [target["flops"]],
            [_number(target["actual"])],
            "o",
            color=INK,
            ms=10,
            mec="white",
            mew=1.4,
            label="actual",
            zorder=6,
        )
    _plain_ticks(axes)
    axes.legend(loc="upper right")


def _target(axes: Any, data: dict[str, Any]) -> None:
    target = data["target"]
    curve = target.get("curve")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.set_title("The target, held to its line")
    steps = [step for step, _ in target["samples"]]
    losses = [_number(loss) for _, loss in target["samples"]]
    seen = [
        v
        for s, v in zip(steps, losses, strict=True)
        if math.isfinite(v) and s >= 0.06 * max(steps, default=0)
    ]
    if curve:
        axes.fill_between(
            curve["step"], curve["p05"], curve["p95"], color=PREDICTED, alpha=0.16, lw=0, label="90% interval"
        )
        axes.plot(curve["step"], curve["p50"], color=PREDICTED, lw=1.6, ls=(0, (5, 3)), label="predicted")
        last = max(curve["step"])
        for edge in ("p05", "p95"):
            seen += [v for s, v in zip(curve["step"], curve[edge], strict=True) if s >= 0.06 * last]
    axes.plot(steps, losses, color=INK, alpha=0.25, lw=0.8, label="loss")
    axes.plot(steps, _smooth(losses, max(5.0, len(losses) / 60)), color=INK, lw=1.8, label="smoothed")
    if seen:
        pad = 0.06 * (max(seen) - min(seen) or 1)
        axes.set_ylim(min(seen) - pad, max(seen) + pad)
    axes.legend(loc="upper right")


def _drill(axes: Any, drill: dict[str, Any], curve: dict[str, Any] | None) -> None:
    """Close up: the steps around the fault, in the band that a healthy run would have stayed in."""
    steps = [step for step, _ in drill["samples"]]
    losses = [_number(loss) for _, loss in drill["samples"]]
    fault, called, paged = drill["fault_step"], drill.get("called_step"), drill.get("paged_step")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    said = "not called"
    if called is not None:
        said = f"called {count(called - fault, 'step')} after" if called != fault else "called at once"
        said += f" ({drill.get('alert')})"
    axes.set_title(f"{drill['name']}: {said}")
    reach = max(60, 5 * abs((called or fault) - fault), 1.3 * ((paged or fault) - fault))
    end = min(max(steps, default=fault), fault + 2 * reach)
    start = max(min(steps, default=0), fault - max(reach, 2.2 * reach - (end - fault)))
    axes.set_xlim(start, end + 0.02 * (end - start) + 1)
    seen = [v for s, v in zip(steps, losses, strict=True) if math.isfinite(v) and start <= s <= end]
    if curve:
        near = [i for i, s in enumerate(curve["step"]) if start <= s <= end]
        low, high = ([curve[q][i] for i in near] for q in ("p05", "p95"))
        axes.fill_between(curve["step"], curve["p05"], curve["p95"], color=PREDICTED, alpha=0.16, lw=0)
        axes.plot(curve["step"], curve["p50"], color=PREDICTED, lw=1.4, ls=(0, (5, 3)))
        seen += [*low, *high]
    axes.plot(steps, losses, color=INK, lw=1.3)
    axes.axvline(fault, color=BAD, lw=1.4, ls=(0, (4, 3)), label=f"fault, step {fault:,}")
    if called is not None:
        color = BAD if drill.get("severity") == "critical" else WARN
        axes.axvline(called, color=color, lw=2, label=f"called, step {called:,}")
    if paged is not None and paged != called:
        axes.axvline(paged, color=BAD, lw=2, label=f"paged, step {paged:,}")
    lost = [s for s, v in zip(steps, losses, strict=True) if not math.isfinite(v)]
    if lost:
        spaced = lost[:: max(1, len(lost) // 12)]
        place = axes.get_xaxis_transform()
        axes.plot(
            spaced, [0.04] * len(spaced), "x", color=BAD, ms=7, mew=2, transform=place, label="not a number"
        )
    if seen:
        axes.set_ylim(min(seen) * 0.985, max(seen) * 1.015)
    _plain_ticks(axes, "y")
    axes.legend(loc="best")


def _plain_ticks(axes: Any, which: str = "y") -> None:
    """Losses as 2.4 and not as 2.4 x 10^0."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    axis.set_major_locator(MaxNLocator(7) if high / max(low, 1e-12) < 10 else LogLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.minorticks_off()


def _number(value: Any) -> float:
    number = unspell(value)
    return math.nan if number is None else number


def _smooth(values: list[float], width: float) -> list[float]:
    """A running mean over `width` values that starts unbiased; what is not finite stays a gap."""
    keep, mean, weight, out = 1 - 2 / (width + 1), 0.0, 0.0, []
    for value in values:
        if not math.isfinite(value):
            out.append(math.nan)
            continue
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
