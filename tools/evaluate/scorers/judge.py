"""A language model as a judge, behind an OpenAI-compatible URL."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from ....kernels.common.errors import InputError
from ...cli.terminal import say
from .endpoint import KEY, Endpoint
from .rubric import Better, Prompt, comparison, rating, read_better, read_mark

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .answer import Answer

Outcome = Literal["win", "tie", "lose"]
Read = TypeVar("Read")

AT_ONCE = 8
"""Questions under way at the same time."""
MOST_TOKENS = 1024
"""Of a reply: a reason, and the verdict."""
STRAIGHT: dict[Better, Outcome] = {Better.FIRST: "win", Better.SECOND: "lose", Better.TIE: "tie"}
SWAPPED: dict[Better, Outcome] = {Better.FIRST: "lose", Better.SECOND: "win", Better.TIE: "tie"}
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
        self._endpoint = Endpoint(argument, os.environ.get(KEY, ""))
        self._seed = seed

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """The mean mark of each answer over its preferences.

        None for one without text or preferences, or where a mark is missing. Raises RunError when the judge
        cannot be asked.
        """
        asked = [_ratings(answer) for answer in answers]
        found = self._ask([prompt for prompts in asked for prompt in prompts], read_mark)
        return [_mean([found[prompt] for prompt in prompts]) for prompts in asked]

    def compare(self, pairs: Sequence[tuple[Answer, Answer]]) -> list[Outcome | None]:
        """Whether the first answer of each pair is the better by its preferences and their weights.

        Both answer the same question and wishes. Each pair is judged in both orders: where these disagree it
        is a tie. None where an order has no verdict, or no preference has a weight. Raises RunError when the
        judge cannot be asked, ValueError for answers that cannot be compared.
        """
        asked = [prompt for pair in pairs for prompt in _comparisons(*pair)]
        random.Random(self._seed).shuffle(asked)
        found = self._ask(asked, read_better)
        return [_outcome(mine, other, found) for mine, other in pairs]

    def _ask(
        self, prompts: Sequence[Prompt], read: Callable[[str], Read | None]
    ) -> dict[Prompt, Read | None]:
        """What is read of the reply to each prompt, None for nothing. The same prompt is asked once."""
        different = list(dict.fromkeys(prompts))
        if not different:
            return {}
        _ = self._endpoint.model  # asked for once, before many threads want it
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            said = list(pool.map(lambda prompt: self._verdict(prompt, read), different))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if missing := said.count(None):
            say(f"the judge gave no verdict that can be read to {missing} of {len(different)} questions")
        return dict(zip(different, said, strict=True))

    def _verdict(self, prompt: Prompt, read: Callable[[str], Read | None]) -> Read | None:
        reply = self._endpoint.complete(prompt.messages, MOST_TOKENS)
        found = read(reply)
        if found is None:
            found = read(self._endpoint.complete(prompt.again(reply), MOST_TOKENS))
        return found


def _ratings(answer: Answer) -> list[Prompt]:
    """One a preference; none where there is nothing to mark."""
    if not answer.text.strip():
        return []
    return [rating(answer.question, preference, answer.text) for preference in answer.preferences]


def _mean(marks: Sequence[int | None]) -> float | None:
    known = [mark for mark in marks if mark is not None]
    return sum(known) / len(known) if known and len(known) == len(marks) else None


def _comparisons(mine: Answer, other: Answer) -> list[Prompt]:
    """Both orders; none where the outcome is known, or cannot be."""
    wishes = _wishes(mine)
    if mine.question != other.question or wishes != _wishes(other):
        raise ValueError("answers to different questions or wishes cannot be compared")
    if not wishes or mine.text == other.text:
        return []
    orders = (mine.text, other.text), (other.text, mine.text)
    return [comparison(mine.question, wishes, first, second) for first, second in orders]


def _outcome(mine: Answer, other: Answer, found: Mapping[Prompt, Better | None]) -> Outcome | None:
    prompts = _comparisons(mine, other)
    if not prompts:
        return "tie" if _wishes(mine) else None
    straight, swapped = (found[prompt] for prompt in prompts)
    if straight is None or swapped is None:
        return None
    return STRAIGHT[straight] if STRAIGHT[straight] == SWAPPED[swapped] else "tie"


def _wishes(answer: Answer) -> list[tuple[str, float]]:
    """The preferences that count, with their weights."""
    both = zip(answer.preferences, answer.weights, strict=True)
    return [(text, weight) for text, weight in both if weight > 0]
