"""LLM-as-a-judge scorer, at an OpenAI-compatible URL."""

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
MAX_REPLY_TOKENS = 1024
"""Enough for a reason and the verdict."""
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
"""The outcome of a verdict for the answer shown first, and for the one shown second."""


class Judge:
    """Rates answers from 1 to 5 by their objectives, and compares pairs.

    The argument is a server's URL, `http://localhost:8000/v1`, with `?model=NAME` if it has several models.
    The key is OPENAI_API_KEY. `seed` sets the order of comparison requests.
    """

    scale: ClassVar[tuple[float, float] | None] = (1.0, 5.0)

    def __init__(self, argument: str, seed: int = 0) -> None:
        if not argument:
            raise InputError("the scorer judge needs an address: judge:http://localhost:8000/v1")
        self.name = f"judge:{argument}"
        self._endpoint = ChatEndpoint(argument, os.environ.get(API_KEY_ENV, ""))
        self._seed = seed

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """The mean rating of each answer over its objectives.

        None for one without text or objectives, or if a rating is missing. Raises RunError if a request to
        the judge fails.
        """
        prompts_per_answer = [_rating_prompts(answer) for answer in answers]
        marks = self._ask_all([prompt for prompts in prompts_per_answer for prompt in prompts], parse_mark)
        return [_mean_mark([marks[prompt] for prompt in prompts]) for prompts in prompts_per_answer]

    def compare(self, pairs: Sequence[tuple[Answer, Answer]]) -> list[Outcome | None]:
        """Whether the first answer of each pair is better by the weighted objectives.

        Both answers of a pair have the same question and objectives. Each pair is judged in both orders; if
        they disagree, it is a tie. None if an order has no verdict or no objective has a weight. Raises
        RunError if a request to the judge fails, ValueError for answers that cannot be compared.
        """
        prompts = [prompt for pair in pairs for prompt in _comparison_prompts(*pair)]
        random.Random(self._seed).shuffle(prompts)
        verdicts = self._ask_all(prompts, parse_preferred)
        return [_resolve_outcome(mine, other, verdicts) for mine, other in pairs]

    def _ask_all(
        self, prompts: Sequence[JudgePrompt], parse: Callable[[str], Parsed | None]
    ) -> dict[JudgePrompt, Parsed | None]:
        """The parsed reply to each prompt, None without a verdict. Equal prompts are sent once."""
        unique = list(dict.fromkeys(prompts))
        if not unique:
            return {}
        _ = self._endpoint.model  # cached before the threads start
        executor = ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS)
        try:
            verdicts = list(executor.map(lambda prompt: self._get_verdict(prompt, parse), unique))
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
        if num_missing := verdicts.count(None):
            log_line(f"the judge gave no readable verdict on {num_missing} of {len(unique)} prompts")
        return dict(zip(unique, verdicts, strict=True))

    def _get_verdict(self, prompt: JudgePrompt, parse: Callable[[str], Parsed | None]) -> Parsed | None:
        reply = self._endpoint.complete(prompt.messages, MAX_REPLY_TOKENS)
        verdict = parse(reply)
        if verdict is None:
            verdict = parse(self._endpoint.complete(prompt.retry_messages(reply), MAX_REPLY_TOKENS))
        return verdict


def _rating_prompts(answer: Answer) -> list[JudgePrompt]:
    """One prompt for each objective; none for an empty answer."""
    if not answer.text.strip():
        return []
    return [rating_prompt(answer.question, preference, answer.text) for preference in answer.preferences]


def _mean_mark(marks: Sequence[int | None]) -> float | None:
    valid = [mark for mark in marks if mark is not None]
    return sum(valid) / len(valid) if valid and len(valid) == len(marks) else None


def _comparison_prompts(mine: Answer, other: Answer) -> list[JudgePrompt]:
    """Prompts for both orders; none for equal texts or without weighted objectives."""
    objectives = _weighted_objectives(mine)
    if mine.question != other.question or objectives != _weighted_objectives(other):
        raise ValueError("answers to different questions or objectives cannot be compared")
    if not objectives or mine.text == other.text:
        return []
    orders = (mine.text, other.text), (other.text, mine.text)
    return [comparison_prompt(mine.question, objectives, first, second) for first, second in orders]


def _resolve_outcome(
    mine: Answer, other: Answer, verdicts: Mapping[JudgePrompt, PreferredAnswer | None]
) -> Outcome | None:
    prompts = _comparison_prompts(mine, other)
    if not prompts:
        return "tie" if _weighted_objectives(mine) else None
    straight, swapped = (verdicts[prompt] for prompt in prompts)
    if straight is None or swapped is None:
        return None
    return (
        OUTCOME_WHEN_FIRST[straight]
        if OUTCOME_WHEN_FIRST[straight] == OUTCOME_WHEN_SECOND[swapped]
        else "tie"
    )


def _weighted_objectives(answer: Answer) -> list[tuple[str, float]]:
    """The objectives with a weight above 0, and their weights."""
    pairs = zip(answer.preferences, answer.weights, strict=True)
    return [(text, weight) for text, weight in pairs if weight > 0]
