"""The pictures of a run. The owner of matplotlib."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

INK, ACCENT, QUIET = "#1f2933", "#c2410c", "#94a3b8"
COLOURS = ("#c2410c", "#1d4ed8", "#047857", "#7c3aed", "#a16207", "#be185d")


def plot_sharpness(scores: Any, selected: Sequence[str]) -> bytes:
    """A bar a layer in model order, its spread over batches, the selected ones marked; the bytes of a PNG.

    scores: names, score and std [layers], stability, how (see sharpness.Scores).
    """
    figure, axes = _figure(width=max(6.0, 0.22 * len(scores.names) + 2), height=4.6)
    values, places = scores.score.tolist(), range(len(scores.names))
    chosen = set(selected)
    colours = [ACCENT if name in chosen else QUIET for name in scores.names]
    axes.bar(places, values, color=colours, yerr=scores.std.tolist(), ecolor=INK, error_kw={"linewidth": 0.7})
    axes.set_xticks(list(places), scores.names, rotation=90, fontsize=7)
    for tick, name in zip(axes.get_xticklabels(), scores.names, strict=True):
        tick.set_color(ACCENT if name in chosen else INK)
    axes.set_ylabel(f"rise of the adversarial loss at ρ = {scores.how.rho:g}")
    axes.set_title(
        f"Layer sharpness: {len(chosen)} of {len(values)} selected; rank stability {scores.stability:.2f}", loc="left"
    )
    axes.margins(x=0.01)
    return _png(figure)


def plot_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], *, chance: float) -> bytes:
    """Held-out accuracy over epochs, clean (dashed) and robust (solid), a colour a method; the bytes of a PNG."""
    figure, axes = _figure(width=7.5, height=4.6)
    for (name, history), colour in zip(histories.items(), COLOURS, strict=False):
        points = [r for r in history if "held_out_clean" in r]
        epochs = [r["epoch"] + 1 for r in points]
        for key, style, label in (
            ("held_out_robust", "-o", f"{name}, robust"),
            ("held_out_clean", "--o", f"{name}, clean"),
        ):
            axes.plot(epochs, [100 * r[key] for r in points], style, color=colour, label=label, markersize=3)
    boundary = _boundary(histories)
    if boundary:
        axes.axvline(boundary + 0.5, color=QUIET, linewidth=1)
        axes.annotate("stage 2", (boundary + 0.6, 0.02), xycoords=("data", "axes fraction"), color=INK, fontsize=8)
    axes.axhline(100 * chance, color=QUIET, linewidth=1, linestyle=":")
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy on held-out training images, %")
    axes.set_ylim(0, 102)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    return _png(figure)


def _boundary(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    """How many epochs stage 1 took."""
    return max((sum(r["stage"] != "finetune" for r in h) for h in histories.values()), default=0)


def _figure(*, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # the object interface: no display, no global state

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
