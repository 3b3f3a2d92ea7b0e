"""The learning curves of a run as a picture."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN, PURPLE = "#2563eb", "#ea580c", "#059669", "#7c3aed"
LIGHT = {"alpha": 0.35, "linewidth": 1.2, "marker": ""}
DASHED = {"linestyle": (0, (3, 2)), "linewidth": 1.6, "marker": ""}


def draw(records: list[dict], path: Path, title: str) -> None:
    """Write a PNG from the records of metrics.jsonl; overwrites `path`."""
    train = [record for record in records if record["kind"] == "train"]
    heldout = [record for record in records if record["kind"] == "eval"]
    shown = [panel for name, panel in PANELS.items() if any(name in record for record in heldout)]
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(11, 3.6 * rows), dpi=150, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, hspace=0.06, wspace=0.04)
    for panel, axes in zip(shown, figure.subplots(rows, 2, squeeze=False).flat, strict=True):
        panel(axes, train, heldout)
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)


def _generator(axes: Axes, train: list[dict], heldout: list[dict]) -> None:
    _plot(axes, train, "mlm_loss", BLUE, "training", **LIGHT)
    _plot(axes, heldout, "mlm_loss", BLUE, "held-out")
    _finish(axes, "Generator: masked-token loss", "nats per token")


def _discriminator(axes: Axes, train: list[dict], heldout: list[dict]) -> None:
    _plot(axes, heldout, "prior_loss", FAINT, "H(fake rate)", **DASHED)
    _plot(axes, train, "disc_loss", ORANGE, "training", **LIGHT)
    _plot(axes, heldout, "disc_loss", ORANGE, "held-out")
    steps, low, high = _series(heldout, "disc_loss", "prior_loss")
    below = [a < b for a, b in zip(low, high, strict=True)]
    axes.fill_between(steps, low, high, where=below, color=ORANGE, alpha=0.10, linewidth=0)
    _zoom(axes, [*low, *high])
    _finish(axes, "Discriminator: loss, and that of a constant guess", "nats per token")


def _main_loss(axes: Axes, train: list[dict], heldout: list[dict]) -> None:
    _plot(axes, train, "main_loss", ORANGE, "training", **LIGHT)
    _plot(axes, heldout, "main_loss", ORANGE, "held-out")
    _finish(axes, "Main network: loss of the tokens it predicts", "nats per token")


def _ranking(axes: Axes, train: list[dict], heldout: list[dict]) -> None:
    for name, color in (("auc", GREEN), ("precision", PURPLE), ("recall", BLUE)):
        _plot(axes, heldout, name, color, {"auc": "AUC"}.get(name, name))
    axes.set_ylim(0, 1.02)
    _finish(axes, "Discriminator: finding the replaced tokens", "")


def _main_accuracy(axes: Axes, train: list[dict], heldout: list[dict]) -> None:
    _plot(axes, heldout, "main_accuracy", GREEN, "its best token is right")
    _percent(axes)
    _finish(axes, "Main network: accuracy", "")


def _rates(axes: Axes, train: list[dict], heldout: list[dict]) -> None:
    for name, color, label in (
        ("mlm_accuracy", BLUE, "generator's best token is right"),
        ("sampled_accuracy", PURPLE, "its sampled token is right"),
        ("fake_rate", ORANGE, "replaced tokens among all"),
    ):
        _plot(axes, heldout, name, color, label)
    _percent(axes)
    _finish(axes, "Generator: accuracy, and the fakes it makes", "")


PANELS = {  # a score that a run's objective has → the panel that shows it
    "mlm_loss": _generator,
    "disc_loss": _discriminator,
    "main_loss": _main_loss,
    "auc": _ranking,
    "main_accuracy": _main_accuracy,
    "fake_rate": _rates,
}


def _percent(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")


def _series(records: list[dict], *names: str) -> list[list[float]]:
    """The steps and the values of each name; None, which JSON has for NaN, is a gap, as is none."""
    columns = [[record.get(name) for record in records] for name in ("step", *names)]
    return [[math.nan if value is None else value for value in column] for column in columns]


def _plot(axes: Axes, records: list[dict], name: str, color: str, label: str, **style) -> None:
    steps, values = _series(records, name)
    marker = "o" if len(steps) <= 25 else ""
    style = {"linewidth": 2.0, "marker": marker, "markersize": 4, **style}
    axes.plot(steps, values, color=color, label=label, **style)


def _zoom(axes: Axes, values: list[float]) -> None:
    """Show what the discriminator gains; its first losses, far above, would flatten that."""
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        low, high = min(finite), max(finite)
        margin = 0.12 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    axes.set_ylabel(unit, color=FAINT, fontsize=9)
    axes.set_xlabel("step", color=FAINT, fontsize=9)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best", handlelength=1.8)
