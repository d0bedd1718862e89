"""The report's pictures, each for a wide or a narrow screen and for a light or a dark page.

Figures are made without pyplot, so that nothing stays behind in the process. The same input gives the same
bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keelweight.errors import require
from keelweight.evaluation.rates import Rate
from keelweight.inputs.layouts import SCORED_ROLES
from keelweight.selection.profile import Place
from keelweight.tuning.train import Step

RATES = {
    "asr": "Harmful prompts: complied",
    "over_refusal": "Harmless prompts: refused",
    "borderline_refusal": "Borderline prompts: refused",
}
"""Rate -> what it counts, in the order of the page."""

FONT = "DejaVu Sans"
"""Comes with matplotlib, so that every machine draws the same picture."""

PAGE_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Theme:
    """Colours of a picture. The series stay apart with any common colour blindness (after Okabe and Ito)."""

    text: str
    muted: str
    line: str
    track: str
    series: Mapping[str, str]
    ramp: tuple[str, ...]
    background: str = "none"


LIGHT = Theme(
    text="#1c2430",
    muted="#5a6472",
    line="#d5dae1",
    track="#edf0f4",
    series={"before": "#d55e00", "after": "#0072b2", "control": "#8a93a0"},
    ramp=("#d3e5f5", "#a3c8e8", "#4d96cf", "#0b62a8", "#062f5c"),
)
DARK = Theme(
    text="#e7ebf0",
    muted="#a3adba",
    line="#38424f",
    track="#252d38",
    series={"before": "#f0914a", "after": "#56b4e9", "control": "#8b95a3"},
    ramp=("#1c3c5c", "#1f5687", "#2f83c0", "#74bff0", "#e2f3ff"),
)
PAPER = Theme(LIGHT.text, LIGHT.muted, LIGHT.line, LIGHT.track, LIGHT.series, LIGHT.ramp, background="#ffffff")
"""For the picture files: they may be shown on any background."""

Draw = Callable[[Theme, bool], Any]
"""(theme, narrow) -> matplotlib figure."""


def before_after(sides: Mapping[str, Mapping[str, Rate]], theme: Theme, narrow: bool) -> Any:
    """One panel a rate, one bar a side, each with its 95% interval, count, and what was left unscored.

    Args:
        sides: `before`, `after` and perhaps `control` -> rate name -> rate.
        theme: colours.
        narrow: panels below each other, for a phone.
    """
    names = [name for name in RATES if any(name in rates for rates in sides.values())]
    height = 0.62 + 0.5 * len(sides)
    figure = _figure((3.5, height * len(names)) if narrow else (10.0, height))
    figure.get_layout_engine().set(wspace=0.08, hspace=0.07)
    grid = (len(names), 1) if narrow else (1, len(names))
    for axes, name in zip(figure.subplots(*grid, squeeze=False).flat, names, strict=True):
        axes.set_title(RATES[name], loc="left", pad=9)
        shown = {side: rates[name] for side, rates in sides.items() if name in rates}
        for row, (side, rate) in enumerate(shown.items()):
            _bar(axes, row, side, rate, theme)
        axes.set(xlim=(0, 1), ylim=(len(sides) - 0.62, -0.62), yticks=[])
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "", "50%", "", "100%"])
        first, *_, last = axes.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
    return figure


def _bar(axes: Any, row: int, side: str, rate: Rate, theme: Theme) -> None:
    """A bar on a grey track of 100%, its name above on the left, its figures above on the right."""
    axes.barh(row, 1, height=0.34, color=theme.track, linewidth=0)
    if rate.rate is not None:
        low, high = rate.interval
        axes.barh(row, rate.rate, height=0.34, color=theme.series[side], linewidth=0)
        reach = [[max(0.0, rate.rate - low)], [max(0.0, high - rate.rate)]]
        axes.errorbar(rate.rate, row, xerr=reach, color=theme.text, elinewidth=1.1, capsize=2.6, capthick=1.1)
    figures = f"{rate.rate:.1%} ({rate.hits}/{rate.judged})" if rate.rate is not None else "no verdict"
    unscored = f", {rate.unscored} unscored" if rate.unscored else ""
    axes.text(0, row - 0.27, side.capitalize(), va="bottom", color=theme.text)
    axes.text(1, row - 0.27, figures + unscored, va="bottom", ha="right", color=theme.text)


def where(places: Sequence[Place], theme: Theme, narrow: bool) -> Any:
    """Two heat maps layer x role: chosen weights by count, and as a share of the role's own weights there."""
    roles = ordered_roles(places)
    layers = sorted({place.layer for place in places if place.layer is not None})
    columns: list[int | None] = [*layers, *([None] if any(place.layer is None for place in places) else [])]
    panels = (
        ("Chosen weights", [float(place.chosen) for place in places], "{x:,.0f}"),
        (
            "Share of the role's weights there",
            [place.chosen / max(1, place.size) for place in places],
            "share",
        ),
    )
    if narrow:
        figure = _figure((3.5, 1.35 + min(9.0, max(1.6, 0.155 * len(columns)))))
        both = figure.subplots(1, 2)
    else:
        figure = _figure((10.0, 1.5 + 2 * max(0.7, 0.25 * len(roles))))
        both = figure.subplots(2, 1)
    for number, (axes, (title, values, unit)) in enumerate(zip(both, panels, strict=True)):
        cells = [(columns.index(p.layer), roles.index(p.role)) for p in places]
        mesh = _cells(axes, cells, values, theme, turned=narrow)
        axes.set_title(title if not narrow else ("Count", "Share of role")[number], loc="left", pad=7)
        _layer_axis(axes, columns, roles, turned=narrow, inner=number == 1 if narrow else number == 0)
        bar = figure.colorbar(
            mesh,
            ax=axes,
            location="bottom" if narrow else "right",
            pad=0.02,
            aspect=12 if narrow else 9,
            shrink=0.95,
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        _scale(bar, max(values, default=0.0), unit, few=narrow)
    return figure


def ordered_roles(places: Sequence[Place]) -> list[str]:
    """The roles that occur: the usual ones in their usual order, then others as they come in the model."""
    found = list(dict.fromkeys(place.role for place in places))
    return [role for role in SCORED_ROLES if role in found] + [role for role in found if role not in SCORED_ROLES]


def _cells(axes: Any, cells: list[tuple[int, int]], values: list[float], theme: Theme, *, turned: bool) -> Any:
    """One square with a small gap around it for each (layer, role) that the model has."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Rectangle

    squares = []
    for layer, role in cells:
        x, y = (role, layer) if turned else (layer, role)
        squares.append(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92))
    blues = LinearSegmentedColormap.from_list("keelweight", theme.ramp)
    ramp = blues.with_extremes(under=theme.track)  # none at all is grey, and told apart from few
    scale = Normalize(1e-12, max(values, default=0.0) or 1.0)
    drawn = PatchCollection(squares, cmap=ramp, norm=scale, linewidths=0)
    drawn.set_array(values)
    axes.add_collection(drawn)
    return drawn


def _layer_axis(axes: Any, columns: list[int | None], roles: list[str], *, turned: bool, inner: bool) -> None:
    """Layers along the long axis, labelled every few; weights outside the layers come last, as a dash."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if len(columns) / step <= 17)
    ticks = [at for at, layer in enumerate(columns) if layer is None or layer % step == 0]
    if len(ticks) > 1 and columns[ticks[-1]] is None and ticks[-1] - ticks[-2] < max(1, step / 2):
        del ticks[-2]
    labels = ["–" if columns[at] is None else str(columns[at]) for at in ticks]
    long, short = (axes.yaxis, axes.xaxis) if turned else (axes.xaxis, axes.yaxis)
    long.set_ticks(ticks, [] if inner else labels)
    short.set_ticks(range(len(roles)), roles)
    if turned:
        axes.tick_params(axis="x", rotation=90)
        axes.set(xlim=(-0.6, len(roles) - 0.4), ylim=(len(columns) - 0.4, -0.6))
    else:
        axes.set(xlim=(-0.6, len(columns) - 0.4), ylim=(len(roles) - 0.4, -0.6))
    if not inner:
        long.set_label_text("layer")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


def _scale(bar: Any, highest: float, unit: str, *, few: bool) -> None:
    """A few round numbers beside a colour bar."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    bar.locator = MaxNLocator(2 if few else 4, integer=unit != "share")
    decimals = 0 if highest >= 0.05 else min(6, 1 - math.floor(math.log10(100 * highest))) if highest else 0
    as_share = FuncFormatter(lambda x, _: f"{x:.{max(0, decimals)}%}")
    bar.formatter = as_share if unit == "share" else FuncFormatter(lambda x, _: f"{x:,.0f}")
    bar.update_ticks()


def training(steps: Mapping[str, Sequence[Step]], theme: Theme, narrow: bool) -> Any:
    """Refusal loss and keep loss over the iterations, each with its running mean, above the learning rate.

    Args:
        steps: `after` and perhaps `control` -> what each iteration did.
        theme: colours.
        narrow: panels below each other, for a phone.
    """
    figure = _figure((3.5, 4.4) if narrow else (10.0, 2.9))
    panels = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    titles = {"refusal_loss": "Refusal loss (nats per token)", "keep_loss": "Keep loss (KL, nats per token)"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        axes.set_title(title, loc="left", pad=7)
        for side, history in steps.items():
            x = [step.step for step in history]
            y = [getattr(step, name) for step in history]
            colour, dashes = theme.series[side], "-" if side == "after" else (0, (4, 2))
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(x, running_mean(y), color=colour, linewidth=1.8, linestyle=dashes, label=LABELS[side])
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=theme.line, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
        axes.set_xlabel("iteration" if axes is panels[-1] or not narrow else "")
        _learning_rate(axes, next(iter(steps.values())), theme)
    if len(steps) > 1:
        lines = panels[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside upper left", ncols=2, frameon=False, labelcolor=theme.text)
    return figure


LABELS = {"after": "chosen weights", "control": "random weights (control)"}


def _learning_rate(axes: Any, history: Sequence[Step], theme: Theme) -> None:
    """The learning rate as a pale shape behind the curves, on a scale of its own."""
    behind = axes.twinx()
    behind.fill_between([s.step for s in history], [s.lr for s in history], color=theme.muted, alpha=0.10, linewidth=0)
    behind.set(ylim=(0, 1.05 * max((s.lr for s in history), default=1.0) or 1.0), yticks=[])
    for spine in behind.spines.values():
        spine.set_visible(False)
    behind.set_zorder(axes.get_zorder() - 1)
    axes.patch.set_visible(False)


def running_mean(values: Sequence[float], reach: int = 4) -> list[float]:
    """Mean of each value and up to `reach` values on either side of it."""
    windows = [values[max(0, at - reach) : at + reach + 1] for at in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def to_svg(draw: Draw, theme: Theme, *, narrow: bool = False) -> bytes:
    """The picture as SVG, with text as text in the reader's own font."""
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    drawn = _render(draw, theme, narrow, format="svg", metadata=nothing)
    return drawn.replace(f"'{FONT}'".encode(), PAGE_FONTS.encode())


def to_png(draw: Draw, theme: Theme, *, narrow: bool = False, dpi: int = 200) -> bytes:
    """The picture as PNG."""
    return _render(draw, theme, narrow, format="png", dpi=dpi, metadata={"Software": None})


def _render(draw: Draw, theme: Theme, narrow: bool, **how: Any) -> bytes:
    """Draw in the report's style, whatever matplotlib's settings are here, and give those back."""
    matplotlib = require("matplotlib", extra="report", purpose="the report")
    file = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_style(theme))
        draw(theme, narrow).savefig(file, facecolor=theme.background, **how)
    return file.getvalue()


def _figure(size: tuple[float, float]) -> Any:
    """An empty figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _style(theme: Theme) -> dict[str, Any]:
    """The report's look as matplotlib settings."""
    return {
        "font.family": [FONT],
        "font.size": 8.5,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlecolor": theme.text,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.line,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "text.color": theme.text,
        "text.parse_math": False,
        "xtick.color": theme.line,
        "ytick.color": theme.line,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "svg.fonttype": "none",
        "svg.hashsalt": "keelweight",
    }
