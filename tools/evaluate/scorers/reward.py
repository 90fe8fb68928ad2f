"""The score of a reward model: how good it finds the answer to the question."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ....kernels.common.errors import InputError
from ....models.classifier import Classifier, open_classifier
from ....models.weights.safetensors import torch_dtype
from ...cli.display import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .answer import Answer


class Reward:
    """A folder with a `…ForSequenceClassification` of one label, such as reward models are published as.

    Raises InputError for any other folder; RunError when memory is short.
    """

    scale: ClassVar[tuple[float, float] | None] = None

    def __init__(self, argument: str) -> None:
        if not argument:
            raise InputError("the scorer reward needs a folder with a reward model: reward:PATH")
        opened = open_classifier(Path(argument).expanduser())
        labels = opened.config.labels
        if len(labels) != 1:
            raise InputError(
                f"{argument!r} scores {len(labels)} labels ({', '.join(map(repr, labels[:8]))}"
                f"{', …' if len(labels) > 8 else ''}); a reward model has one"
            )
        self.name = f"reward:{argument}"
        with progress(f"trimtab: loading {argument} …") as report:
            self._model = Classifier(opened, torch_dtype(opened.config.dtype), report)

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """One an answer; None for one without text, or that the model has no room or no template for."""
        read = {index: ids for index, answer in enumerate(answers) if (ids := self._token_ids(answer))}
        scores = self._model.scores(list(read.values()))[:, 0].tolist()
        found = dict(zip(read, scores, strict=True))
        return [found.get(index) for index in range(len(answers))]

    def _token_ids(self, answer: Answer) -> list[int]:
        """The conversation's, [] where it cannot be scored."""
        if not answer.text.strip():
            return []
        try:
            ids = self._model.token_ids(_conversation(answer.question, answer.text))
        except InputError:  # about this one text
            return []
        return ids if len(ids) <= self._model.context else []


def _conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
