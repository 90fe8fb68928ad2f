"""A language model as a judge, behind an OpenAI-compatible URL."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from ....kernels.common.errors import InputError
from ...cli.terminal import log_line
from .endpoint import API_KEY_ENV, ChatEndpoint
from .rubric import (
    JudgePrompt,
    PreferredAnswer,
    comparison_prompt,
    parse_mark,
    parse_preferred,
    rating_prompt,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .answer import Answer

Outcome = Literal["win", "tie", "lose"]
Parsed = TypeVar("Parsed")

MAX_CONCURRENT_REQUESTS = 8
"""Questions under way at the same time."""
MAX_REPLY_TOKENS = 1024
"""Of a reply: a reason, and the verdict."""
OUTCOME_WHEN_FIRST: dict[PreferredAnswer, Outcome] = {
    PreferredAnswer.FIRST: "win",
    PreferredAnswer.SECOND: "lose",
    PreferredAnswer.TIE: "tie",
}
OUTCOME_WHEN_SECOND: dict[PreferredAnswer, Outcome] = {
    PreferredAnswer.FIRST: "lose",
    PreferredAnswer.SECOND: "win",
    PreferredAnswer.TIE: "tie",
}
"""What a verdict means for an answer that stands first, and for one that stands second."""


class Judge:
    """Marks answers from 1 to 5 by their preferences, and compares them.

    The address is that of a server, `http://localhost:8000/v1`, with `?model=NAME` where it has several; the
    key is OPENAI_API_KEY. `seed` sets the order in which comparisons are asked.
    """

    scale: ClassVar[tuple[float, float] | None] = (1.0, 5.0)

    def __init__(self, argument: str, seed: int = 0) -> None:
        if not argument:
            raise InputError("the scorer judge needs an address: judge:http://localhost:8000/v1")
        self.name = f"judge:{argument}"
        self._endpoint = ChatEndpoint(argument, os.environ.get(API_KEY_ENV, ""))
        self._seed = seed

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """The mean mark of each answer over its preferences.

        None for one without text or preferences, or where a mark is missing. Raises RunError when the judge
        cannot be asked.
        """
        prompts_per_answer = [_rating_prompts(answer) for answer in answers]
        marks = self._ask_all([prompt for prompts in prompts_per_answer for prompt in prompts], parse_mark)
        return [_mean_mark([marks[prompt] for prompt in prompts]) for prompts in prompts_per_answer]

    def compare(self, pairs: Sequence[tuple[Answer, Answer]]) -> list[Outcome | None]:
        """Whether the first answer of each pair is the better by its preferences and their weights.

        Both answer the same question and objectives. Each pair is judged in both orders: where these
        disagree it is a tie. None where an order has no verdict, or no preference has a weight. Raises
        RunError when the judge cannot be asked, ValueError for answers that cannot be compared.
        """
        prompts = [prompt for pair in pairs for prompt in _comparison_prompts(*pair)]
        random.Random(self._seed).shuffle(prompts)
        verdicts = self._ask_all(prompts, parse_preferred)
        return [_resolve_outcome(mine, other, verdicts) for mine, other in pairs]

    def _ask_all(
        self, prompts: Sequence[JudgePrompt], parse: Callable[[str], Parsed | None]
    ) -> dict[JudgePrompt, Parsed | None]:
        """What is read of the reply to each prompt, None for nothing. The same prompt is asked once."""
        unique = list(dict.fromkeys(prompts))
        if not unique:
            return {}
        _ = self._endpoint.model  # asked for once, before many threads want it
        executor = ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS)
        try:
            verdicts = list(executor.map(lambda prompt: self._get_verdict(prompt, parse), unique))
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
        if num_missing := verdicts.count(None):
            log_line(
                f"the judge gave no verdict that can be read to {num_missing} of {len(unique)} questions"
            )
        return dict(zip(unique, verdicts, strict=True))

    def _get_verdict(self, prompt: JudgePrompt, parse: Callable[[str], Parsed | None]) -> Parsed | None:
        reply = self._endpoint.complete(prompt.messages, MAX_REPLY_TOKENS)
        verdict = parse(reply)
        if verdict is None:
            verdict = parse(self._endpoint.complete(prompt.retry_messages(reply), MAX_REPLY_TOKENS))
        return verdict


def _rating_prompts(answer: Answer) -> list[JudgePrompt]:
    """One a preference; none where there is nothing to mark."""
    if not answer.text.strip():
        return []
    return [rating_prompt(answer.question, preference, answer.text) for preference in answer.preferences]


def _mean_mark(marks: Sequence[int | None]) -> float | None:
    valid = [mark for mark in marks if mark is not None]
    return sum(valid) / len(valid) if valid and len(valid) == len(marks) else None


def _comparison_prompts(mine: Answer, other: Answer) -> list[JudgePrompt]:
    """Both orders; none where the outcome is known, or cannot be."""
    preferences = _weighted_preferences(mine)
    if mine.question != other.question or preferences != _weighted_preferences(other):
        raise ValueError("answers to different questions or objectives cannot be compared")
    if not preferences or mine.text == other.text:
        return []
    orders = (mine.text, other.text), (other.text, mine.text)
    return [comparison_prompt(mine.question, preferences, first, second) for first, second in orders]


def _resolve_outcome(
    mine: Answer, other: Answer, verdicts: Mapping[JudgePrompt, PreferredAnswer | None]
) -> Outcome | None:
    prompts = _comparison_prompts(mine, other)
    if not prompts:
        return "tie" if _weighted_preferences(mine) else None
    straight, swapped = (verdicts[prompt] for prompt in prompts)
    if straight is None or swapped is None:
        return None
    return (
        OUTCOME_WHEN_FIRST[straight]
        if OUTCOME_WHEN_FIRST[straight] == OUTCOME_WHEN_SECOND[swapped]
        else "tie"
    )


def _weighted_preferences(answer: Answer) -> list[tuple[str, float]]:
    """The preferences that count, with their weights."""
    pairs = zip(answer.preferences, answer.weights, strict=True)
    return [(text, weight) for text, weight in pairs if weight > 0]
