"""Render the report as Markdown: a verdict, some answers, tables and a legend of their columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..metrics.statistics import NUM_DRAWS, Estimate
from ..study import grid

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..metrics.result import Result, RowResult
    from ..study.answers_file import Answers
    from ..study.row import Row
    from ..study.study import Study

INTERVAL_NOTE = (
    f"Brackets hold 95 % intervals: bootstrap over questions, {NUM_DRAWS:,} draws, the same for all rows."
)
COLUMN_HELP = {
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
    "model without objectives: lower is more fluent to it. An answer that repeats itself has a low one, too.",
    "log-prob": "mean log-probability of a token under the model without objectives.",
    "repetition": "share of word triples that stood in the answer before.",
    "truncated": "share of answers that were cut off at max_tokens.",
    "unscored": "share of answers that some aim's scorer could not score, most for being empty.",
    "words": "mean length.",
    "KL": "mean divergence, in nats a token, of what was sampled from the merged policy.",
}
DISPLAY_NAMES = {"logprob": "log-prob", "kl": "KL"}
TRAILING_MEASURES = ("logprob", "truncated", "unscored", "words", "kl")
PERCENT_MEASURES = ("truncated", "unscored")


NUM_SHOWN_WEIGHTS, NUM_SHOWN_QUESTIONS = 5, 3
MAX_SHOWN_CHARS = 280


def render_report(study: Study, result: Result, answers: Answers, metadata: dict[str, Any]) -> str:
    """Render the report. `metadata`: the fields of report.json besides results, such as command."""
    closest = _closest_row(result)
    sections = ["# trimtab evaluate", _verdict(result), _study_summary(study, result, metadata)]
    if closest is not None:
        row = next(row for row in study.rows if row.label == closest.label)
        sections += [f"## Answers of {_escape_cell(row.label)}", _answers_table(study, row, answers)]
    if result.notes:
        sections.append("\n".join(f"- **{note}**" for note in result.notes))
    sections += ["## Methods", _methods_table(study, result), INTERVAL_NOTE, _column_legend(result)]
    sections += [
        "## Points",
        "One row for each weight; ▲ is on the Pareto front of its method.",
        _points_table(study, result),
    ]
    sections += ["![The Pareto front](pareto.png)", "![Score against asked weight](dial.png)"]
    return "\n\n".join(sections) + "\n"


def _closest_row(result: Result) -> RowResult | None:
    """The row whose least steerability is highest; None if no dial can be judged."""
    rows = [row for row in result.rows if _min_steerability(row) is not None]
    return max(rows, key=lambda row: _min_steerability(row) or 0.0, default=None)


def _min_steerability(row: RowResult) -> float | None:
    values = [each.value for each in row.steerability]
    return None if None in values or not values else min(value for value in values if value is not None)


def _verdict(result: Result) -> str:
    """One sentence: which method follows the weights, and which reaches most."""
    closest = _closest_row(result)
    widest = max(result.rows, key=lambda row: row.hypervolume.value or 0.0)
    reach = f"{_escape_cell(widest.label)} reaches most (hypervolume {widest.hypervolume.value or 0.0:.2f})"
    if closest is None:
        return f"**No method's scores move with both weights; {reach}.**"
    name, steerability = _escape_cell(closest.label), _min_steerability(closest)
    closely = f"{name} follows the asked weights most closely (steerability of every aim at least "
    return f"**{closely}{steerability:.2f}); {reach}.**"


def _answers_table(study: Study, row: Row, answers: Answers) -> str:
    """Answers to the first questions, side by side, at weights from the first aim to the last."""
    step = max((len(study.weights) - 1) / (NUM_SHOWN_WEIGHTS - 1), 1)
    indices = sorted({min(round(k * step), len(study.weights) - 1) for k in range(NUM_SHOWN_WEIGHTS)})
    questions = study.questions[:NUM_SHOWN_QUESTIONS]
    body = []
    for weights in (study.weights[index] for index in indices):
        texts = [answers[study.answer_key(row, weights, question)][0].text for question in questions]
        body.append([_escape_cell(grid.format_weights(weights)), *map(_shorten, texts)])
    return _format_table(["weights", *(_escape_cell(question.text) for question in questions)], body)


def _shorten(text: str) -> str:
    cell = _escape_cell(text)
    return cell if len(cell) <= MAX_SHOWN_CHARS else cell[:MAX_SHOWN_CHARS].rsplit(" ", 1)[0] + " …"


def _study_summary(study: Study, result: Result, metadata: dict[str, Any]) -> str:
    provenance, params = metadata["provenance"]["reported"], study.settings.sampling_params
    lines = [
        f"    {metadata['command']}",
        "",
        f"{len(study.questions)} questions ({metadata['questions']['source']}, digest "
        f"{metadata['questions']['digest'][:12]}), model {study.settings.engine_config.model}, "
        f"{'greedy' if params.temperature == 0 else f'temperature {params.temperature:g}'}, "
        f"at most {params.max_tokens} tokens. trimtab {provenance['trimtab']}, "
        f"commit {(provenance['commit'] or 'none')[:12]}"
        f"{' with changes' if provenance['dirty'] else ''}, {provenance['machine']['cpu']}.",
        "",
        *(
            f"- Aim {k}: {_objective_text(target.text)} Measured by {target.scorer}, "
            f"{'less' if target.sign < 0 else 'more'} is better; means from {low:.4g} (0) to {high:.4g} (1)."
            for k, (target, (low, high)) in enumerate(zip(study.targets, result.ranges, strict=True), 1)
        ),
    ]
    return "\n".join(lines)


def _objective_text(text: str | None) -> str:
    return "the question's own objective." if text is None else f"“{_escape_cell(text)}”"


def _methods_table(study: Study, result: Result) -> str:
    first_row = result.rows[0]
    measures = _measure_names(first_row)
    headers = [
        "method",
        "points",
        *(f"steerability {target.label}" for target in study.targets),
        "hypervolume",
        *(f"less that of {name}" for name in first_row.lead),
        "spread",
    ]
    headers += [f"wins vs {name}" for name in first_row.wins] + [
        f"judged vs {name}" for name in first_row.judged
    ]
    headers += list(first_row.marks)
    headers += [DISPLAY_NAMES.get(name, name) for name in measures]
    body = [
        [
            _escape_cell(row.label),
            str(row.points),
            *(_format_interval(each) for each in row.steerability),
            _format_interval(row.hypervolume),
            *(_format_interval(each) for each in row.lead.values()),
            _format_interval(row.spread),
            *(_format_interval(each, percent=True) for each in row.wins.values()),
            *(
                _format_interval(row.judged.get(name, Estimate(None)), percent=True)
                for name in first_row.judged
            ),
            *(_format_interval(each, percent=name == "AMR") for name, each in row.marks.items()),
            *(_format_measure(name, row.measures[name]) for name in measures),
        ]
        for row in result.rows
    ]
    return _format_table(headers, body)


def _points_table(study: Study, result: Result) -> str:
    measures = _measure_names(result.rows[0])
    headers = ["method", "weights", *(target.label for target in study.targets), "front"]
    headers += [DISPLAY_NAMES.get(name, name) for name in measures]
    body = [
        [
            _escape_cell(point.label),
            "; ".join(_escape_cell(grid.format_weights(weights)) for weights in point.weights),
            *(_format_interval(score) for score in point.scores),
            "▲" if point.front else "",
            *(_format_measure(name, point.measures[name], interval=False) for name in measures),
        ]
        for point in result.points
    ]
    return _format_table(headers, body)


def _measure_names(row: RowResult) -> list[str]:
    """Names of the measures to show: extra scorers, then TRAILING_MEASURES."""
    fact_names = ("words", "tokens", "truncated", "logprob", "kl", "strength", "unscored")
    return [name for name in row.measures if name not in fact_names] + list(TRAILING_MEASURES)


def _column_legend(result: Result) -> str:
    rating_help = {
        "AMR": "share of answers rated at least 3 of 5 for every objective.",
        "APS": "mean rating over objectives.",
        "Worst": "mean over answers of the lowest rating.",
    }
    judge_help = {"judged": "the same by a judge that compares two answers, in both orders."}
    first_row = result.rows[0]
    columns = (
        COLUMN_HELP | (judge_help if first_row.judged else {}) | (rating_help if first_row.marks else {})
    )
    return "\n".join(f"- *{name}*: {text}" for name, text in columns.items())


def _format_measure(name: str, estimate: Estimate, interval: bool = True) -> str:
    return _format_interval(estimate, percent=name in PERCENT_MEASURES, interval=interval)


def _format_interval(estimate: Estimate, percent: bool = False, interval: bool = True) -> str:
    """`0.62 [0.55, 0.70]`, or n/a without a value."""
    if estimate.value is None:
        return "n/a"
    if not interval or estimate.low is None or estimate.high is None:
        return _format_number(estimate.value, percent) + (" %" if percent else "")
    interval_text = f"[{_format_number(estimate.low, percent)}, {_format_number(estimate.high, percent)}]"
    return f"{_format_number(estimate.value, percent)}{' %' if percent else ''} {interval_text}"


def _format_number(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.0f}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _format_table(headers: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escape_cell(text: str) -> str:
    """Escape text for a Markdown table cell: one line, no `|` or `*` markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")
