"""Scorers on short texts, and the refusal of invalid scorer names."""

from __future__ import annotations

import math
import sys

import pytest
from trimtab.kernels.common.errors import InputError
from trimtab.tools.evaluate import scorers
from trimtab.tools.evaluate.scorers.answer import Answer


def make_answer(text: str, base_logprob: float | None = -1.0) -> Answer:
    return Answer("What is rain?", ("Be kind.",), (1.0,), text, 7, base_logprob, "stop")


def score(scorer: str, text: str) -> float | None:
    return scorers.make_scorer(scorer).score([make_answer(text)])[0]


@pytest.mark.parametrize(
    ("scorer", "text", "expected"),
    [
        ("length", "It's a well-known fact: 3 of them.", 7),
        ("length:words", "naïve café", 2),
        ("length:characters", "  abc d ", 5),
        ("length:sentences", "One. Two! “Three?” Four\nFive 3.5", 5),
        ("length:tokens", "abc", 7),
        ("lexical:sea|sky", "The Sea and the sky, the sea.", 3 / 7),
        (r"lexical:\bsea\b", "season sea", 1 / 2),
        ("lexical:a{1,2}", "aaa b", 2 / 2),
        ("style:pirate", "Arrr, matey! ARRR! Me ship\u2019s a ship.", 3),
        ("style:cowboy", "Y\u2019all ain't from the west", 3),
        ("format:bullets", "- one\n* two\n 3. three\n4) four\n-no\n1.5 kg", 4),
        ("format:headings", "# One\ntext\n**Two:**\n**bold** text\n#none", 2),
        ("format:sentences", "One. Two!", 2),
        ("format:paragraphs", "a\nb\n\nc\n \nd\n", 3),
        ("repetition", "a b c d", 0),
        ("repetition", "a b c a b c a b c", 1 - 3 / 7),
        ("repetition:1", "a A b", 1 / 3),
        ("repetition", "two words", 0),
        ("perplexity", "x", math.e),
    ],
)
def test_scores_match_hand_counts(scorer: str, text: str, expected: float) -> None:
    assert score(scorer, text) == pytest.approx(expected)
    assert scorers.make_scorer(scorer).name == scorer


@pytest.mark.parametrize(
    "scorer", ["length", "lexical:a", "style:pirate", "format:bullets", "repetition", "vader", "textstat"]
)
@pytest.mark.parametrize("text", ["", " \n", ':||"'])
def test_text_without_words_has_no_score(scorer: str, text: str) -> None:
    assert score(scorer, text) is None


def test_perplexity_needs_tokens_and_stays_finite() -> None:
    scores = scorers.make_scorer("perplexity").score([make_answer("x", None), make_answer("x", -1e9)])
    assert scores[0] is None
    assert scores[1] is not None
    assert math.isfinite(scores[1])


def test_vader_measures_sentiment_independent_of_length() -> None:
    joy, grief = score("vader", "I love this wonderful day!"), score("vader", "I hate this horrible day.")
    assert joy is not None
    assert grief is not None
    assert grief < -0.5 < 0.5 < joy
    plain = score("vader", "This is good.")
    assert score("vader", "This is good. " * 9) == pytest.approx(plain)
    score_of_text = score("vader:whole", "This is good. " * 9)
    assert score_of_text is not None
    assert plain is not None
    assert score_of_text > plain


def test_textstat_rates_plain_words_easier() -> None:
    plain, hard = (
        "The cat sat on the mat.",
        "Institutional heterogeneity complicates epistemological generalisation.",
    )
    for index, easier in (("flesch_reading_ease", 1), ("gunning_fog", -1)):
        first, second = score(f"textstat:{index}", plain), score(f"textstat:{index}", hard)
        assert first is not None
        assert second is not None
        assert easier * first > easier * second


def test_every_readability_index_gives_a_finite_number() -> None:
    from trimtab.tools.evaluate.scorers.readability import INDICES  # noqa: PLC0415

    scores = [
        score(f"textstat:{index}", "The rain falls. It is wet, and we stay at home.") for index in INDICES
    ]
    assert all(value is not None and math.isfinite(value) for value in scores)


@pytest.mark.parametrize(
    ("scorer", "says"),
    [
        ("vadr", "unknown scorer 'vadr'; scorers are vader, length"),
        ("vader:x", "vader has the argument 'x'"),
        ("length:miles", "unknown unit 'miles'"),
        ("textstat:x", "unknown index 'x'"),
        ("lexical", "needs a regular expression"),
        ("lexical:(", "invalid regular expression"),
        ("style:polite", "style has the argument 'polite'; styles are pirate, formal"),
        ("format:tables", "must be one of bullets, headings"),
        ("repetition:0", "number of words"),
        ("perplexity:x", "takes no argument"),
    ],
)
def test_an_invalid_scorer_is_refused_in_a_sentence(scorer: str, says: str) -> None:
    with pytest.raises(InputError, match=says.replace("(", r"\(")):
        scorers.make_scorer(scorer)


@pytest.mark.parametrize(("scorer", "package"), [("vader", "vaderSentiment"), ("textstat", "textstat")])
def test_a_missing_package_is_named_with_the_extra_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, scorer: str, package: str
) -> None:
    module = f"{scorers.__name__}.{scorers.SCORERS[scorer][0]}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs the package {package}.*trimtab\[evaluate\]"):
        scorers.make_scorer(scorer)
