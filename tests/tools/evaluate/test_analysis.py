"""Analysis of synthetic scores with known results."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from trimtab.tools.evaluate.metrics.analysis import Analysis
from trimtab.tools.evaluate.metrics.ratings import rating_metrics
from trimtab.tools.evaluate.metrics.result import Result, RowResult
from trimtab.tools.evaluate.metrics.scoring import FACT_GETTERS, Scores
from trimtab.tools.evaluate.metrics.statistics import bootstrap_counts
from trimtab.tools.evaluate.metrics.table import ScoreTable
from trimtab.tools.evaluate.study import study as studies
from trimtab.tools.evaluate.study.settings import StudySettings
from trimtab.tools.evaluate.study.study import Study

Value = Callable[[str, tuple[float, ...], int], float]
"""A score by row, weights and question."""


def make_study(methods: str = "base,prompt,mato", weights: int = 5, **more: object) -> Study:
    aims = ("Be kind.=vader", "Be brief.=-length")
    return studies.make_study(StudySettings(aim=aims, methods=methods, weights=weights, limit=12, **more))  # type: ignore[arg-type]


def score_table(made: Study, value: Value) -> dict[str, np.ndarray]:
    return {
        row.label: np.array([[[value(row.label, w, q.index)] for q in made.questions] for w in made.weights])
        for row in made.rows
    }


def analyze(
    made: Study, first: Value, second: Value, logprob: Value = lambda *_: -1.0, marked: bool = False
) -> Result:
    facts = {
        name: score_table(made, logprob if name == "logprob" else lambda *_: 0.0) for name in FACT_GETTERS
    }
    scores = Scores((score_table(made, first), score_table(made, second)), {}, facts)
    return Analysis(ScoreTable(made, scores, bootstrap_counts(12)[:61]), marked, {}).compute()


def row_of(result: Result, label: str) -> RowResult:
    return next(row for row in result.rows if row.label == label)


def perfect_scores(label: str, weights: tuple[float, ...], question: int) -> float:
    """mato scores the requested weight, every prompt half of it, base 0; plus an offset by question."""
    strength = {"base": 0.0, "mato": 1.0}.get(label, 0.5)
    return strength * weights[0] + 0.01 * question


def perfect_length_scores(label: str, weights: tuple[float, ...], question: int) -> float:
    strength = {"base": 0.0, "mato": 1.0}.get(label, 0.5)
    return strength * weights[1] - 10


def test_a_method_that_follows_its_weights_is_steerable_and_wins() -> None:
    result = analyze(make_study(), perfect_scores, perfect_length_scores)
    mato, base = row_of(result, "mato"), row_of(result, "base")
    assert [each.value for each in mato.steerability] == pytest.approx([1.0, 1.0])
    assert [each.value for each in base.steerability] == [None, None]
    assert mato.wins["base"].value == mato.wins["prompt"].value == 1.0
    assert base.wins["base"].value == 0.5
    assert base.wins["prompt"].value == 0.0
    # the front is the line from (1, 0) to (0, 1) in five points
    assert mato.hypervolume.value == pytest.approx(0.25 * (0.25 + 0.5 + 0.75))
    assert mato.spread.value == pytest.approx(1.0)
    assert base.hypervolume.value == 0.0
    assert mato.lead["base"].value == mato.hypervolume.value
    prompts = row_of(result, "prompt, all wordings").hypervolume
    assert mato.hypervolume.value is not None
    assert prompts.value is not None
    assert mato.lead["prompt"].value == pytest.approx(mato.hypervolume.value - prompts.value)
    # mato is ahead by the same amount on every question, so it is in every draw
    assert mato.lead["prompt"].low is not None
    assert mato.lead["prompt"].low > 0


def test_ranges_and_points_are_in_the_scorers_units() -> None:
    result = analyze(make_study(), perfect_scores, perfect_length_scores)
    assert result.ranges == (pytest.approx((0.055, 1.055)), pytest.approx((10.0, 9.0)))
    ends = [point for point in result.points if point.label == "mato"]
    assert [point.weights for point in ends] == [(w,) for w in make_study().weights]
    assert ends[-1].scores[1].value == pytest.approx(9.0)
    assert ends[0].normalised == pytest.approx((1.0, 0.0))
    base = next(point for point in result.points if point.label == "base")
    assert base.weights == make_study().weights


def test_prompt_wordings_share_one_pareto_front() -> None:
    def best_in(way: str, other: str) -> Value:
        return lambda label, weights, _: {way: 1.0, other: 0.2, "mato": 0.0}.get(label, 0.1)

    result = analyze(
        make_study(), best_in("prompt/words", "prompt/order"), best_in("prompt/order", "prompt/words")
    )
    together, words = row_of(result, "prompt, all wordings"), row_of(result, "prompt/words")
    assert words.hypervolume.value == pytest.approx(0.2)
    assert together.hypervolume.value == pytest.approx(0.2 + 0.2 * 0.8)
    assert together.points == 3 + 3 + 3 + 2
    labels = [each.label for each in result.rows]
    assert labels.index("prompt, all wordings") == labels.index("prompt/order") + 1


def test_an_answer_without_a_score_is_excluded_from_means_and_loses() -> None:
    def mute(label: str, weights: tuple[float, ...], question: int) -> float:
        return math.nan if label == "mato" and question < 3 else perfect_scores(label, weights, 0)

    result = analyze(make_study(), mute, perfect_length_scores)
    mato = row_of(result, "mato")
    assert mato.measures["unscored"].value == pytest.approx(0.25)
    # at the last weight the objective with the missing score has weight 0
    assert mato.wins["base"].value == pytest.approx(1 - 0.25 * 4 / 5)
    assert mato.steerability[0].value == pytest.approx(1.0)
    assert any("have no score" in note and note.split("of: ")[1].startswith("mato") for note in result.notes)


def test_a_disfluent_point_counts_only_without_the_fluent_setting() -> None:
    def logprob(label: str, weights: tuple[float, ...], question: int) -> float:
        return -5.0 if label == "mato" and weights[0] == 1 else -1.0

    loose = analyze(make_study(), perfect_scores, perfect_length_scores, logprob)
    strict = analyze(make_study(fluent=3.0), perfect_scores, perfect_length_scores, logprob)
    assert any("no language" in note for note in loose.notes)
    assert loose.ranges[0][1] == pytest.approx(1.055)
    assert strict.ranges[0][1] == pytest.approx(0.805)
    first = next(point for point in strict.points if point.label == "mato")
    assert (first.front, first.normalised) == (False, (None, None))
    assert row_of(strict, "mato").wins["base"].value == pytest.approx(0.8)
    assert row_of(loose, "mato").wins["base"].value == 1.0


def test_few_weights_short_answers_and_few_questions_give_caveats() -> None:
    result = analyze(
        make_study(weights=3, sampling={"max_tokens": 16}), perfect_scores, perfect_length_scores
    )
    caveats = " ".join(result.notes)
    for expected_caveat in ("--weights 3 is fewer than 7", "16 tokens", "12 questions"):
        assert expected_caveat in caveats
    assert "not to be trusted" not in " ".join(
        analyze(make_study(weights=7), perfect_scores, perfect_length_scores).notes
    )


def test_constant_scores_do_not_divide_by_zero() -> None:
    result = analyze(make_study(), lambda *_: 2.0, perfect_length_scores)
    assert row_of(result, "mato").hypervolume.value == 0.0
    assert any("No point differs" in note for note in result.notes)


def test_ratings_are_summarized_as_all_met_mean_and_lowest() -> None:
    ratings = np.array([[5.0, 3, 2, math.nan], [3.0, 3, 5, 5]])
    result = rating_metrics(ratings)
    assert result["AMR"].tolist()[:3] == [1, 1, 0]
    assert result["APS"].tolist()[:3] == [4, 3, 3.5]
    assert result["Worst"].tolist()[:3] == [3, 3, 2]
    assert all(np.isnan(values[3]) for values in result.values())


def test_ratings_are_shown_only_where_every_target_is_rated() -> None:
    made = make_study()
    five = lambda label, weights, question: 3.0 if label == "mato" else 2.0  # noqa: E731
    result = analyze(made, five, five, marked=True)
    assert row_of(result, "mato").marks["AMR"].value == 1.0
    assert row_of(result, "base").marks["AMR"].value == 0.0
    assert row_of(analyze(made, five, five), "mato").marks == {}
