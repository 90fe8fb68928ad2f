"""Reward model scorer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ....kernels.common.errors import InputError
from ....models.classifier import SequenceClassifier, load_classifier_bundle
from ....models.weights.safetensors import torch_dtype
from ...cli.display import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .answer import Answer


class Reward:
    """Scores answers by a `…ForSequenceClassification` model of one label, loaded from a folder.

    Raises InputError for any other folder, RunError if memory is too small.
    """

    scale: ClassVar[tuple[float, float] | None] = None

    def __init__(self, argument: str) -> None:
        if not argument:
            raise InputError("the scorer reward needs a folder with a reward model: reward:PATH")
        bundle = load_classifier_bundle(Path(argument).expanduser())
        labels = bundle.config.labels
        if len(labels) != 1:
            raise InputError(
                f"{argument!r} scores {len(labels)} labels ({', '.join(map(repr, labels[:8]))}"
                f"{', …' if len(labels) > 8 else ''}); a reward model has one"
            )
        self.name = f"reward:{argument}"
        with progress(f"trimtab: loading {argument} …") as on_progress:
            self._model = SequenceClassifier(bundle, torch_dtype(bundle.config.dtype), on_progress)

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """One score for each answer; None for one without text, too long, or refused by the chat template."""
        token_ids = {index: ids for index, answer in enumerate(answers) if (ids := self._token_ids(answer))}
        scores = self._model.score(list(token_ids.values()))[:, 0].tolist()
        scores_by_index = dict(zip(token_ids, scores, strict=True))
        return [scores_by_index.get(index) for index in range(len(answers))]

    def _token_ids(self, answer: Answer) -> list[int]:
        """Token ids of question and answer, [] if they cannot be scored."""
        if not answer.text.strip():
            return []
        try:
            ids = self._model.encode(_conversation(answer.question, answer.text))
        except InputError:  # the template refuses this text
            return []
        return ids if len(ids) <= self._model.context_length else []


def _conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
