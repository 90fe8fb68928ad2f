"""Study definition: objectives, weights, wordings, questions, settings and the resulting requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trimtab.kernels.common.errors import InputError
from trimtab.tools.common import questions
from trimtab.tools.common.questions import Question
from trimtab.tools.evaluate.study import grid, prompt_wordings, settings, study, target
from trimtab.tools.evaluate.study.settings import StudySettings
from trimtab.tools.evaluate.study.target import Target

KIND, BRIEF = "Be kind.", "Be brief."
SETTINGS = StudySettings(
    aim=(f"{KIND}=vader", f"{BRIEF}=-length"), methods="base,prompt,amulet,mato", weights=5, limit=3
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Be kind.=vader", Target("Be kind.", "vader")),
        ("Be brief.=-length:tokens", Target("Be brief.", "length:tokens", -1)),
        ("Say x=y.= vader ", Target("Say x=y.", "vader")),
        ("Be kind.=judge:http://h/v1?model=m", Target("Be kind.", "judge:http://h/v1?model=m")),
        ("Be odd.=lexical:a=b", Target("Be odd.", "lexical:a=b")),
        ("=vader", Target(None, "vader")),
    ],
)
def test_a_target_is_split_before_the_scorer(text: str, expected: Target) -> None:
    assert target.parse_target(text) == expected


@pytest.mark.parametrize("text", ["Be kind.", "Be kind.=vadr", "Be kind.=", "vader"])
def test_a_target_without_a_scorer_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="OBJECTIVE=SCORER"):
        target.parse_target(text)


def test_a_target_without_an_objective_stands_for_each_preference_of_the_question() -> None:
    questions = [Question(0, "a?", ("x", "y")), Question(1, "b?", ("z", "w"))]
    targets = target.parse_targets(["=-length"], questions)
    assert [[each.objective_text(q) for each in targets] for q in questions] == [["x", "y"], ["z", "w"]]
    assert [each.label for each in targets] == ["-length 1", "-length 2"]
    with pytest.raises(InputError, match="question 1 has 1 preferences"):
        target.parse_targets(["=vader"], [questions[0], Question(1, "b?", ("z",))])
    with pytest.raises(InputError, match="must be the only --aim"):
        target.parse_targets(["=vader", "Be kind.=vader"], questions)


def test_the_weight_grid_is_a_line_for_two_objectives_and_a_triangle_for_three() -> None:
    assert grid.simplex_grid(2, 5) == [(1, 0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0, 1)]
    triangle = grid.simplex_grid(3, 4)
    assert len(triangle) == len(set(triangle)) == 10
    assert all(sum(weights) == pytest.approx(1) for weights in triangle)
    assert grid.simplex_grid(4, 1) == [(0.25,) * 4]
    assert grid.simplex_grid(1, 5) == [(1,), (0.75,), (0.5,), (0.25,), (0,)]
    assert grid.simplex_grid(1, 1) == [(1,)]
    assert grid.format_weights((1 / 6, 5 / 6)) == "1/6 : 5/6"


@pytest.mark.parametrize("way", ["percent", "words", "order"])
def test_a_wording_distinguishes_seven_weights_and_keeps_both_objectives(way: str) -> None:
    inner = [weights for weights in grid.simplex_grid(2, 7) if min(weights) > 0]
    wordings = [prompt_wordings.WORDINGS[way]([KIND, BRIEF], weights) for weights in inner]
    assert all(KIND in text and BRIEF in text for text in wordings)
    assert len(set(wordings)) == (3 if way == "order" else 5)
    assert wordings[0].index(KIND) < wordings[0].index(BRIEF)
    assert way == "percent" or wordings[-1].index(BRIEF) < wordings[-1].index(KIND)


def test_wordings_express_weights_in_per_cent_or_degree_words() -> None:
    assert (
        "Be kind. (importance: 83 %) Be brief. (importance: 17 %)"
        in prompt_wordings.list_with_percentages([KIND, BRIEF], [5 / 6, 1 / 6])
    )
    assert (
        prompt_wordings.list_with_grades([BRIEF, KIND], [1 / 6, 5 / 6])
        == "Above all: Be kind. Only a little: Be brief."
    )


def test_the_builtin_questions_are_64_distinct_ones_in_two_halves() -> None:
    all_questions = questions.read_questions(None)
    assert [q.index for q in all_questions] == list(range(64))
    assert len({q.text for q in all_questions}) == 64
    first, second = questions.read_questions(None, "first"), questions.read_questions(None, "second")
    assert sorted([*first, *second], key=lambda q: q.index) == list(all_questions)
    assert {q.index % 2 for q in first} == {0}


@pytest.mark.parametrize(
    "text",
    [
        '[{"index": 4, "question": "a?", "preferences": ["x", "y"]}]',
        '{"index": 4, "prompt": "a?", "rubric": [{"criteria": "x"}, {"criteria": "y"}]}\n',
        '\ufeff[{"index": 4, "instruction": "a?", "preference_set": [{"preference": "x"}, '
        '{"preference": "y"}]}]',
    ],
)
def test_common_question_file_formats_are_read(tmp_path: Path, text: str) -> None:
    file = tmp_path / "questions"
    file.write_text(text, encoding="utf-8")
    assert questions.read_questions(str(file)) == (Question(4, "a?", ("x", "y")),)


def test_plain_text_lines_are_numbered_questions(tmp_path: Path) -> None:
    file = tmp_path / "questions"
    file.write_text('"a?"\n\n"b?"\n')
    assert questions.read_questions(str(file)) == (Question(0, "a?"), Question(1, "b?"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "neither"),
        ("[]", "no questions"),
        ("[5]", "row 0"),
        ('[{"question": " "}]', "row 0"),
        ('[{"question": "a?", "index": "x"}]', "index 'x'"),
        ('[{"question": "a?", "index": 1}, {"question": "b?", "index": 1}]', "same index"),
        ('[{"question": "a?", "preferences": [5]}]', "preferences"),
        ('[{"question": "a?", "preferences": "x"}]', "preferences"),
        ("\u00ff", "neither"),
    ],
)
def test_a_file_without_valid_questions_is_refused_in_a_sentence(
    tmp_path: Path, text: str, says: str
) -> None:
    file = tmp_path / "questions"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        questions.read_questions(str(file))


def test_settings_survive_a_json_round_trip() -> None:
    rich = replace(
        SETTINGS,
        scorers=("lexical:a,b", "length, vader"),
        sampling={"temperature": 0.5, "logit_bias": {3: -1.0}, "stop": ("x",), "seed": 4},
        model={"model": "m", "enable_prefix_caching": False},
    )
    assert rich.extra_scorers == ("lexical:a,b", "length", "vader")
    back = settings.settings_from_dict(json.loads(json.dumps(rich.to_dict())))
    assert (back.sampling_params, back.engine_config, back.to_dict()) == (
        rich.sampling_params,
        rich.engine_config,
        rich.to_dict(),
    )
    for typed in ("--aim 'Be kind.=vader'", "--no-enable-prefix-caching", "--logit-bias 3=-1.0", "--seed 4"):
        assert typed in rich.command


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"weights": 0}, "weights is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"fluent": 0.5}, "fluent is 0.5"),
        ({"half": "third"}, "half is 'third'"),
        ({"scorers": ("a,,b",)}, "empty name"),
        ({"sampling": {"n": 2}}, "greedy answers are all the same"),
    ],
)
def test_invalid_settings_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        StudySettings(**values)


def test_rows_share_a_seed_for_each_question() -> None:
    made = study.make_study(replace(SETTINGS, sampling={"temperature": 1.0, "n": 2, "seed": 10}))
    seeds = {(cell.question.index, cell.request.sampling.seed) for cell in made.cells.values()}
    assert seeds == {(0, 10), (1, 12), (2, 14)}
    assert StudySettings(sampling={"temperature": 1.0}).sampling_params.seed == 0
    assert StudySettings().sampling_params.seed is None


def test_equal_requests_are_merged() -> None:
    made = study.make_study(SETTINGS)
    # base 1; prompt: each alone, both; percent, words: the 3 inner weights; order: 2, its middle is "both";
    # amulet: each alone, both; mato: 5
    assert len(made.cells) == 3 * (1 + 3 + 3 + 3 + 2 + 3 + 5)
    rows = {row.label: row for row in made.rows}
    assert list(rows) == [
        "base",
        "prompt",
        "prompt/percent",
        "prompt/words",
        "prompt/order",
        "amulet",
        "mato",
    ]
    for weights in made.weights:
        joined = min(weights) > 0
        same = made.answer_key(rows["prompt"], weights, made.questions[0]) == made.answer_key(
            rows["prompt/percent"], weights, made.questions[0]
        )
        assert same == (not joined)


def test_a_method_with_an_explicit_default_is_the_same_request() -> None:
    made = study.make_study(replace(SETTINGS, methods="mato,mato:tau=1,mato:tau=2"))
    assert len(made.cells) == 3 * 2 * 5


@pytest.mark.parametrize(
    "change",
    [
        lambda s: replace(s, sampling={"max_tokens": 9}),
        lambda s: replace(s, model={"dtype": "float32"}),
        lambda s: replace(s, model={"model": "other"}),
        lambda s: replace(s, system="You are a bird."),
        lambda s: replace(s, aim=("Be kind!=vader", "Be brief!=-length"), methods="mato"),
        lambda s: replace(s, methods="mato:placement=user"),
    ],
)
def test_every_setting_that_changes_an_answer_changes_its_key(
    change: Callable[[StudySettings], StudySettings],
) -> None:
    assert (
        not study.make_study(replace(SETTINGS, methods="mato")).cells.keys()
        & study.make_study(change(replace(SETTINGS, methods="mato"))).cells.keys()
    )


def test_scorers_and_unrelated_settings_do_not_change_keys() -> None:
    other = replace(
        SETTINGS, scorers=("vader",), fluent=2.0, model={"max_num_seqs": 7, "kv_cache_memory": "1GiB"}
    )
    assert study.make_study(SETTINGS).cells.keys() == study.make_study(other).cells.keys()


def test_the_fluent_setting_requires_base() -> None:
    with pytest.raises(InputError, match="add base"):
        study.make_study(replace(SETTINGS, methods="mato", fluent=3.0))
