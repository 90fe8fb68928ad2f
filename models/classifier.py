"""A decoder that reads a conversation to its end and gives it numbers, as reward models do."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from ..kernels.attention_metadata import Segment
from ..kernels.common.errors import InputError
from ..kernels.cpu.linear import filled
from ..kernels.cpu.paged_kv_cache import PagedKV
from .chat.prompts import render_prompt
from .common.json_files import read_json
from .config import CLASSIFIER, ModelConfig
from .forward import forward
from .loader.loader import Opened, open_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from .chat.template import Message
    from .llama import Progress

BLOCK = 64
MOST_TOKENS = 2048
"""Computed in one forward: a longer conversation goes through in pieces, shorter ones several at a time."""


def open_classifier(folder: Path) -> Opened:
    """A classifier of a model folder, but for its weights.

    Raises InputError when the folder holds no such model, or none with a chat template for conversations.
    """
    config = ModelConfig.from_folder(folder)
    if not config.labels:
        raise InputError(
            f"{str(folder)!r} holds a {config.architecture}, which writes texts; what scores them is a model "
            f"for {CLASSIFIER.removeprefix('For')}"
        )
    opened = open_folder(config, folder)
    _closed(opened, [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}])
    return opened


def _closed(opened: Opened, messages: Sequence[Message]) -> list[int]:
    """The ids of a whole conversation in the model's chat template: nobody is asked to go on."""
    if opened.template is None:
        raise InputError(f"{str(opened.checkpoint)!r} has no chat template; conversations are scored by it")
    closed = {"add_generation_prompt": False}
    return render_prompt("conversation", opened.template, opened.tokenizer, messages, closed).prompt_token_ids


class Classifier:
    """A `…ForSequenceClassification` of the Llama family, on the CPU.

    labels: what its head gives a number for. context: the most tokens of a conversation.
    """

    def __init__(self, opened: Opened, dtype: torch.dtype, progress: Progress | None = None) -> None:
        """Loads what `open_classifier` has opened. progress(done, total) counts the bytes of the weights.

        Raises InputError when the weights do not fit the config, RunError when memory is short.
        """
        assert opened.checkpoint is not None
        pad = read_json(opened.checkpoint / "config.json").get("pad_token_id")
        self.labels, self.context = opened.config.labels, opened.config.context
        self._opened, self._config = opened, opened.config
        self._pad, self._dtype = pad, dtype
        self._model = opened.load(dtype, torch.device("cpu"), progress)

    def token_ids(self, messages: Sequence[Message]) -> list[int]:
        """A whole conversation, such as a question and its answer, in the model's chat template.

        Raises InputError when the template cannot render it.
        """
        return _closed(self._opened, messages)

    @torch.inference_mode()
    def scores(self, conversations: Sequence[Sequence[int]]) -> Tensor:
        """The head's product with each conversation's last hidden state, [conversations, labels] float32.

        The last token is the last that is not the config's pad_token_id, as in transformers. The scores of a
        conversation do not depend on the others. Raises InputError for one without tokens, or with more than
        `context`.
        """
        for ids in conversations:
            if not 0 < len(ids) <= self.context:
                raise InputError(f"the conversation has {len(ids)} tokens; it must have 1 to {self.context}")
        ended = [self._ended(ids) for ids in conversations]
        found = torch.empty(len(ended), len(self.labels))
        for members in _groups([len(ids) for ids in ended]):
            found[members] = self._scored([ended[index] for index in members])
        return found

    def _ended(self, ids: Sequence[int]) -> Sequence[int]:
        """Without padding at the end, which no token before it sees."""
        return ids[: max((place for place, token in enumerate(ids) if token != self._pad), default=0) + 1]

    def _scored(self, group: list[Sequence[int]]) -> Tensor:
        """Of conversations that fit one forward, or of one in pieces: all end in the last forward."""
        config, counts = self._config, [-(-len(ids) // BLOCK) for ids in group]
        ends = list(accumulate(counts))
        tables = [list(range(end - count, end)) for count, end in zip(counts, ends, strict=True)]
        sizes = (BLOCK, config.num_kv_heads, config.head_dim)
        cache = PagedKV(config.num_layers, ends[-1], *sizes, self._dtype, self._model.device)
        cache.clear(list(range(ends[-1])))
        for start in range(0, max(map(len, group)), MOST_TOKENS):
            pieces = [ids[start : start + MOST_TOKENS] for ids in group]
            segments = [Segment(start, len(ids), pages) for ids, pages in zip(pieces, tables, strict=True)]
            tokens = [token for ids in pieces for token in ids]
            turned_by = [
                turn
                for ids, piece in zip(group, pieces, strict=True)
                for turn in [config.rope.turned_by(len(ids))] * len(piece)
            ]
            hidden = forward(self._model, segments, tokens, turned_by, cache)
        rows = [end - 1 for end in accumulate(map(len, pieces))]
        return self._model.logits(hidden[filled(rows, hidden.device)])[: len(rows)]


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Conversations that go together, by index: alike in length, MOST_TOKENS in all, or a longer one."""
    members: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if members and tokens + lengths[index] > MOST_TOKENS:
            yield members
            members, tokens = [], 0
        members.append(index)
        tokens += lengths[index]
    if members:
        yield members
