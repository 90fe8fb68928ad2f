"""The report as Markdown: tables, and a sentence for each column."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..metrics.statistics import DRAWS, Estimate
from ..study import grid

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..metrics.result import Result, RowResult
    from ..study.study import Study

INTERVALS = f"Brackets hold 95 % intervals: bootstrap over questions, {DRAWS:,} draws, the same for all rows."
COLUMNS = {
    "method": "the method and the settings that were given; what was not keeps its published default.",
    "points": "how many different answers a question gets over all weights.",
    "steerability": "Spearman's correlation, over the asked weights, of an aim's weight and its mean score: "
    "1 when every more of weight brings more, 0 when the dial does nothing; n/a when no score moves.",
    "hypervolume": "the area (volume) that the Pareto front of a row's points covers, each aim from 0, the "
    "worst mean of all points in this report, to 1, the best: 1 is a point that is best in all.",
    "less that of": "the hypervolume less that of base's point, or of all of prompt's points together, in "
    "the same draws: above 0 the front is ahead. More points cover more, which favours the prompt.",
    "spread": "how much of each aim's range the front covers, on average.",
    "wins": "share of questions and weights at which the weighted mean of normalised scores is higher than "
    "the reference's for the same question and weight; equal counts half. The prompt's is at each weight "
    "that wording which is best there on the whole, so it is favoured.",
    "perplexity": "median over answers of exp of the mean negative log-probability of a token, under the "
    "model without wishes: lower is more fluent to it. An answer that repeats itself has a low one, too.",
    "log-prob": "mean log-probability of a token under the model without wishes.",
    "repetition": "share of word triples that stood in the answer before.",
    "truncated": "share of answers that were cut off at max_tokens.",
    "unscored": "share of answers that some aim's scorer could not score, most for being empty.",
    "words": "mean length.",
    "KL": "mean divergence, in nats a token, of what was sampled from the merged policy.",
}
SHOWN = {"logprob": "log-prob", "kl": "KL"}
LAST = ("logprob", "truncated", "unscored", "words", "kl")
PERCENT = ("truncated", "unscored")


def render(study: Study, result: Result, facts: dict[str, Any]) -> str:
    """The whole report. `facts` are those of report.json: command, questions, provenance."""
    parts = ["# trimtab evaluate", _about(study, result, facts)]
    if result.notes:
        parts.append("\n".join(f"- **{note}**" for note in result.notes))
    parts += ["## Methods", _methods(study, result), INTERVALS, _legend(result)]
    parts += [
        "## Points",
        "One row for each weight; ▲ is on the Pareto front of its method.",
        _points(study, result),
    ]
    parts += ["![The Pareto front](pareto.png)", "![Score against asked weight](dial.png)"]
    return "\n\n".join(parts) + "\n"


def _about(study: Study, result: Result, facts: dict[str, Any]) -> str:
    where, params = facts["provenance"]["reported"], study.settings.params
    lines = [
        f"    {facts['command']}",
        "",
        f"{len(study.questions)} questions ({facts['questions']['source']}, digest "
        f"{facts['questions']['digest'][:12]}), model {study.settings.config.model}, "
        f"{'greedy' if params.temperature == 0 else f'temperature {params.temperature:g}'}, "
        f"at most {params.max_tokens} tokens. trimtab {where['trimtab']}, "
        f"commit {(where['commit'] or 'none')[:12]}"
        f"{' with changes' if where['dirty'] else ''}, {where['machine']['cpu']}.",
        "",
        *(
            f"- Aim {k}: {_wish(aim.text)} Measured by {aim.scorer}, "
            f"{'less' if aim.sign < 0 else 'more'} is better; means from {low:.4g} (0) to {high:.4g} (1)."
            for k, (aim, (low, high)) in enumerate(zip(study.aims, result.ranges, strict=True), 1)
        ),
    ]
    return "\n".join(lines)


def _wish(text: str | None) -> str:
    return "the question's own preference." if text is None else f"“{_cell(text)}”"


def _methods(study: Study, result: Result) -> str:
    first = result.rows[0]
    measures = _measures(first)
    heads = [
        "method",
        "points",
        *(f"steerability {aim.label}" for aim in study.aims),
        "hypervolume",
        *(f"less that of {name}" for name in first.lead),
        "spread",
    ]
    heads += [f"wins vs {name}" for name in first.wins] + [f"judged vs {name}" for name in first.judged]
    heads += list(first.marks)
    heads += [SHOWN.get(name, name) for name in measures]
    body = [
        [
            _cell(row.label),
            str(row.points),
            *(_interval(each) for each in row.steerability),
            _interval(row.hypervolume),
            *(_interval(each) for each in row.lead.values()),
            _interval(row.spread),
            *(_interval(each, percent=True) for each in row.wins.values()),
            *(_interval(row.judged.get(name, Estimate(None)), percent=True) for name in first.judged),
            *(_interval(each, percent=name == "AMR") for name, each in row.marks.items()),
            *(_measure(name, row.measures[name]) for name in measures),
        ]
        for row in result.rows
    ]
    return _table(heads, body)


def _points(study: Study, result: Result) -> str:
    measures = _measures(result.rows[0])
    heads = ["method", "weights", *(aim.label for aim in study.aims), "front"]
    heads += [SHOWN.get(name, name) for name in measures]
    body = [
        [
            _cell(point.label),
            "; ".join(_cell(grid.shown(weights)) for weights in point.weights),
            *(_interval(score) for score in point.scores),
            "▲" if point.front else "",
            *(_measure(name, point.measures[name], interval=False) for name in measures),
        ]
        for point in result.points
    ]
    return _table(heads, body)


def _measures(row: RowResult) -> list[str]:
    """The names of the measures that are shown: of further scorers, then of facts."""
    facts = ("words", "tokens", "truncated", "logprob", "kl", "strength", "unscored")
    return [name for name in row.measures if name not in facts] + list(LAST)


def _legend(result: Result) -> str:
    marks = {
        "AMR": "share of answers that have at least 3 of 5 for every preference.",
        "APS": "mean mark over preferences.",
        "Worst": "an answer's lowest mark, averaged.",
    }
    pairs = {"judged": "the same where a judge says which of two answers is better, asked in both orders."}
    first = result.rows[0]
    columns = COLUMNS | (pairs if first.judged else {}) | (marks if first.marks else {})
    return "\n".join(f"- *{name}*: {text}" for name, text in columns.items())


def _measure(name: str, found: Estimate, interval: bool = True) -> str:
    return _interval(found, percent=name in PERCENT, interval=interval)


def _interval(found: Estimate, percent: bool = False, interval: bool = True) -> str:
    """`0.62 [0.55, 0.70]`; n/a where there is no value."""
    if found.value is None:
        return "n/a"
    if not interval or found.low is None or found.high is None:
        return _number(found.value, percent) + (" %" if percent else "")
    between = f"[{_number(found.low, percent)}, {_number(found.high, percent)}]"
    return f"{_number(found.value, percent)}{' %' if percent else ''} {between}"


def _number(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.0f}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _table(heads: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Text that stays in its cell, on one line and as it is."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")
