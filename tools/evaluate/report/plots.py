"""Two pictures: the Pareto front of every method, and score against asked weight."""

from __future__ import annotations

from itertools import combinations, cycle
from typing import TYPE_CHECKING, Any

from ..scorers import missing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ..metrics.result import PointResult, Result
    from ..metrics.statistics import Estimate
    from ..study.study import Study
    from ..study.target import Aim

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
"""Okabe and Ito's, which the colour-blind tell apart, but brown for their yellow, faint on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")
MOST_PANELS = 6
DPI = 110


def require() -> None:
    """Raises InputError when matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        raise missing("the report's pictures", error.name) from None


def draw(study: Study, result: Result, pareto: Path, dial: Path) -> None:
    """Writes both PNG files."""
    _save(_fronts(study, result), pareto)
    _save(_dials(study, result), dial)


def _fronts(study: Study, result: Result) -> Any:
    """A panel for each pair of aims; the better corner is at the upper right."""
    pairs = list(combinations(range(len(study.aims)), 2))[:MOST_PANELS] or [(0, 0)]
    figure, panels = _panels(len(pairs))
    for axes, (x, y) in zip(panels, pairs, strict=True):
        for label, points, style in _styled(study, result):
            known = [p for p in points if p.scores[x].value is not None and p.scores[y].value is not None]
            for first, second in ((x, "xerr"), (y, "yerr")):
                axes.errorbar(
                    [p.scores[x].value for p in known],
                    [p.scores[y].value for p in known],
                    **{second: _errors([p.scores[first] for p in known])},
                    fmt="none",
                    ecolor=style["color"],
                    elinewidth=0.7,
                    alpha=0.35,
                )
            axes.plot(
                [p.scores[x].value for p in known],
                [p.scores[y].value for p in known],
                label=label,
                linewidth=1 if len(known) > 1 and len(study.aims) == 2 else 0,  # more aims have no one order
                **style,
            )
            _name_ends(axes, known, x, y, style["color"])
        _label(axes.set_xlabel, axes.invert_xaxis, study.aims[x])
        _label(axes.set_ylabel, axes.invert_yaxis, study.aims[y])
    panels[0].set_title(
        "Mean scores by asked weights, 95 % intervals; better is up and right.\n"
        "Beside a point: the asked weight of the first aim in %",
        fontsize=10,
    )
    _legend(figure, panels)
    return figure


def _dials(study: Study, result: Result) -> Any:
    """A panel for each aim: its mean score over its own asked weight."""
    figure, panels = _panels(min(len(study.aims), MOST_PANELS))
    shade = 0.4 / max(4, len(study.rows))  # many bands upon each other hide the lines
    for k, axes in enumerate(panels):
        for label, points, style in _styled(study, result):
            at = _by_weight(points, k)
            if not at:
                continue
            weights, scores = zip(*at, strict=True)
            values = [score.value for score in scores]
            axes.plot(weights, values, label=label, linewidth=1.2, **style)
            lows = [s.value if s.low is None else s.low for s in scores]
            highs = [s.value if s.high is None else s.high for s in scores]
            axes.fill_between(weights, lows, highs, color=style["color"], alpha=shade, linewidth=0)
        axes.set_xlabel(f"asked weight of {study.aims[k].label} (share)")
        _label(axes.set_ylabel, axes.invert_yaxis, study.aims[k])
    panels[0].set_title("Mean score by asked weight, 95 % bands", fontsize=10)
    _legend(figure, panels)
    return figure


def _by_weight(points: Sequence[PointResult], aim: int) -> list[tuple[float, Estimate]]:
    """(weight, score) in order of weight; of more than two aims only where the others have equal weights."""
    found = {}
    for point in points:
        for weights in point.weights:
            others = [w for k, w in enumerate(weights) if k != aim]
            if (not others or max(others) - min(others) < 1e-9) and point.scores[aim].value is not None:
                found[weights[aim]] = point.scores[aim]
    return sorted(found.items())


def _styled(study: Study, result: Result) -> Iterator[tuple[str, list[PointResult], dict[str, Any]]]:
    colours, markers = cycle(COLOURS), cycle(MARKERS)
    for row in study.rows:
        style = {"color": next(colours), "marker": next(markers), "markersize": 4.5}
        yield row.label, [point for point in result.points if point.label == row.label], style


def _name_ends(axes: Any, points: Sequence[PointResult], x: int, y: int, colour: str) -> None:
    """Writes at each point the asked weight of the panel's first aim, in per cent."""
    for point in points:
        shares = [weights[x] for weights in point.weights]
        low, high = min(shares), max(shares)
        text = f"{100 * low:.0f}" if high - low < 1e-9 else f"{100 * low:.0f} to {100 * high:.0f}"
        at = (point.scores[x].value, point.scores[y].value)
        axes.annotate(text, at, (3, 3), textcoords="offset points", fontsize=6, color=colour)


def _errors(scores: Sequence[Estimate]) -> list[list[float]]:
    """How far the intervals reach below and above; an interval need not hold its value."""
    below = [max(0.0, s.value - s.low) if s.value is not None and s.low is not None else 0.0 for s in scores]
    above = [
        max(0.0, s.high - s.value) if s.value is not None and s.high is not None else 0.0 for s in scores
    ]
    return [below, above]


def _label(write: Any, invert: Any, aim: Aim) -> None:
    write(f"{aim.scorer}, {'lower' if aim.sign < 0 else 'higher'} is better" + _unit(aim.scorer))
    if aim.sign < 0:
        invert()


def _unit(scorer: str) -> str:
    name, _, argument = scorer.partition(":")
    units = {"length": argument or "words", "vader": "-1 to 1", "judge": "1 to 5", "lexical": "a word"}
    return f" ({units[name]})" if name in units else ""


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(6.5 * min(count, 2) + 2.5, 5.2 * ((count + 1) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots((count + 1) // 2, min(count, 2), squeeze=False).ravel().tolist()
    for spare in panels[count:]:
        spare.set_axis_off()
    for axes in panels[:count]:
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure, panels[:count]


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI, facecolor="white", format="png")
