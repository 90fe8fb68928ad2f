"""Plots of a study: the Pareto front of every method, and score by requested weight."""

from __future__ import annotations

import textwrap
from itertools import combinations, cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ..metrics.result import PointResult, Result
    from ..metrics.statistics import Estimate
    from ..study.study import Study
    from ..study.target import Target

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
"""The Okabe-Ito colour-blind palette, with brown for its yellow, which is faint on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")
MAX_PANELS = 6
AXIS_WIDTH = 60
"""Characters of a line of an axis label."""
DPI = 110


def draw_plots(study: Study, result: Result, pareto_path: Path, dial_path: Path) -> None:
    """Write both PNG files."""
    _save_figure(_plot_fronts(study, result), pareto_path)
    _save_figure(_plot_dials(study, result), dial_path)


def _plot_fronts(study: Study, result: Result) -> Any:
    """A panel for each pair of objectives; better is up and to the right."""
    pairs = list(combinations(range(len(study.targets)), 2))[:MAX_PANELS] or [(0, 0)]
    figure, panels = _make_panels(len(pairs))
    for axes, (x, y) in zip(panels, pairs, strict=True):
        for label, points, style in _iter_styled_rows(study, result):
            valid = [p for p in points if p.scores[x].value is not None and p.scores[y].value is not None]
            for axis, error_arg in ((x, "xerr"), (y, "yerr")):
                axes.errorbar(
                    [p.scores[x].value for p in valid],
                    [p.scores[y].value for p in valid],
                    **{error_arg: _error_bars([p.scores[axis] for p in valid])},
                    fmt="none",
                    ecolor=style["color"],
                    elinewidth=0.7,
                    alpha=0.35,
                )
            axes.plot(
                [p.scores[x].value for p in valid],
                [p.scores[y].value for p in valid],
                label=label,
                linewidth=1
                if len(valid) > 1 and len(study.targets) == 2
                else 0,  # points of more objectives have no order
                **style,
            )
            _annotate_points(axes, valid, x, y, style["color"])
        _label_axis(axes.set_xlabel, axes.invert_xaxis, study.targets[x])
        _label_axis(axes.set_ylabel, axes.invert_yaxis, study.targets[y])
    panels[0].set_title(
        "Mean scores by asked weights, 95 % intervals; better is up and right.\n"
        "Beside a point: the asked weight of the first aim in %",
        fontsize=10,
    )
    _add_legend(figure, panels)
    return figure


def _plot_dials(study: Study, result: Result) -> Any:
    """A panel for each objective: its mean score by its requested weight."""
    figure, panels = _make_panels(min(len(study.targets), MAX_PANELS))
    band_alpha = 0.4 / max(4, len(study.rows))  # overlapping bands would hide the lines
    for k, axes in enumerate(panels):
        for label, points, style in _iter_styled_rows(study, result):
            curve = _scores_by_weight(points, k)
            if not curve:
                continue
            weights, scores = zip(*curve, strict=True)
            values = [score.value for score in scores]
            axes.plot(weights, values, label=label, linewidth=1.2, **style)
            lows = [s.value if s.low is None else s.low for s in scores]
            highs = [s.value if s.high is None else s.high for s in scores]
            axes.fill_between(weights, lows, highs, color=style["color"], alpha=band_alpha, linewidth=0)
        axes.set_xlabel(f"asked weight of {study.targets[k].label} (share)")
        _label_axis(axes.set_ylabel, axes.invert_yaxis, study.targets[k])
    panels[0].set_title("Mean score by asked weight, 95 % bands", fontsize=10)
    _add_legend(figure, panels)
    return figure


def _scores_by_weight(points: Sequence[PointResult], target_index: int) -> list[tuple[float, Estimate]]:
    """(weight, score) by weight; with more than two objectives, only where the others weigh the same."""
    scores = {}
    for point in points:
        for weights in point.weights:
            others = [w for k, w in enumerate(weights) if k != target_index]
            if (not others or max(others) - min(others) < 1e-9) and point.scores[
                target_index
            ].value is not None:
                scores[weights[target_index]] = point.scores[target_index]
    return sorted(scores.items())


def _iter_styled_rows(
    study: Study, result: Result
) -> Iterator[tuple[str, list[PointResult], dict[str, Any]]]:
    colours, markers = cycle(COLOURS), cycle(MARKERS)
    for row in study.rows:
        style = {"color": next(colours), "marker": next(markers), "markersize": 4.5}
        yield row.label, [point for point in result.points if point.label == row.label], style


def _annotate_points(axes: Any, points: Sequence[PointResult], x: int, y: int, colour: str) -> None:
    """Annotate each point with the requested weight of the panel's first objective, in per cent."""
    for point in points:
        shares = [weights[x] for weights in point.weights]
        low, high = min(shares), max(shares)
        text = f"{100 * low:.0f}" if high - low < 1e-9 else f"{100 * low:.0f} to {100 * high:.0f}"
        position = (point.scores[x].value, point.scores[y].value)
        axes.annotate(text, position, (3, 3), textcoords="offset points", fontsize=6, color=colour)


def _error_bars(scores: Sequence[Estimate]) -> list[list[float]]:
    """Error bar lengths below and above; 0 where the value is outside its interval."""
    below = [max(0.0, s.value - s.low) if s.value is not None and s.low is not None else 0.0 for s in scores]
    above = [
        max(0.0, s.high - s.value) if s.value is not None and s.high is not None else 0.0 for s in scores
    ]
    return [below, above]


def _label_axis(set_label: Any, invert: Any, target: Target) -> None:
    better = "lower" if target.sign < 0 else "higher"
    measure = f"{target.scorer}, {better} is better{_unit_suffix(target.scorer)}"
    set_label(measure if target.text is None else f"{_wrap(target.text)}\n{measure}")
    if target.sign < 0:
        invert()


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, AXIS_WIDTH, max_lines=2, placeholder=" …"))


def _unit_suffix(scorer: str) -> str:
    name, _, argument = scorer.partition(":")
    unit_names = {"length": argument or "words", "vader": "-1 to 1", "judge": "1 to 5", "lexical": "a word"}
    return f" ({unit_names[name]})" if name in unit_names else ""


def _make_panels(num_panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(
        figsize=(6.5 * min(num_panels, 2) + 2.5, 5.2 * ((num_panels + 1) // 2)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots((num_panels + 1) // 2, min(num_panels, 2), squeeze=False).ravel().tolist()
    for unused in panels[num_panels:]:
        unused.set_axis_off()
    for axes in panels[:num_panels]:
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure, panels[:num_panels]


def _add_legend(figure: Any, panels: Sequence[Any]) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)


def _save_figure(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI, facecolor="white", format="png")
