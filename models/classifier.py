"""Sequence classification with a Llama-family decoder: reward models that score a conversation."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from ..kernels.attention_metadata import SequenceChunk
from ..kernels.common.errors import InputError
from ..kernels.cpu.paged_kv_cache import CPUPagedKVCache
from ..kernels.cpu.row_padding import pad_rows
from .architectures.architecture import SEQUENCE_CLASSIFICATION
from .chat.prompts import render_prompt
from .common.json_files import read_json
from .config import ModelConfig
from .forward import forward
from .loader.loader import ModelBundle, bundle_from_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from .chat.template import Message
    from .decoder import Progress

BLOCK_SIZE = 64
MAX_BATCHED_TOKENS = 2048
"""Tokens per forward pass: longer conversations are prefilled in chunks, shorter ones are batched."""


def load_classifier_bundle(folder: Path) -> ModelBundle:
    """Read a classifier's config, tokenizer and chat template from a model folder, without its weights.

    Raises InputError when the folder has no classifier, or no chat template that renders a conversation.
    """
    config = ModelConfig.from_folder(folder)
    if not config.labels:
        raise InputError(
            f"{str(folder)!r} has a {config.architecture}, which generates text; expected a model for "
            f"{SEQUENCE_CLASSIFICATION.removeprefix('For')}"
        )
    bundle = bundle_from_folder(config, folder)
    _encode_conversation(
        bundle, [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    )
    return bundle


def _encode_conversation(bundle: ModelBundle, messages: Sequence[Message]) -> list[int]:
    """Render a conversation with the chat template, without a generation prompt, and return its token ids."""
    if bundle.template is None:
        raise InputError(f"{str(bundle.checkpoint)!r} has no chat template; scoring a conversation needs one")
    template_kwargs = {"add_generation_prompt": False}
    return render_prompt(
        "conversation", bundle.template, bundle.tokenizer, messages, template_kwargs
    ).prompt_token_ids


class SequenceClassifier:
    """A `…ForSequenceClassification` of the Llama family, on the CPU.

    labels: the name of each output of the head. context_length: the maximum tokens of a conversation.
    """

    def __init__(self, bundle: ModelBundle, dtype: torch.dtype, progress: Progress | None = None) -> None:
        """Load the weights of a `load_classifier_bundle` bundle. progress(done, total) counts their bytes.

        Raises InputError when the weights do not match the config, RunError when memory is short.
        """
        assert bundle.checkpoint is not None
        pad_token_id = read_json(bundle.checkpoint / "config.json").get("pad_token_id")
        self.labels, self.context_length = bundle.config.labels, bundle.config.context_length
        self._bundle, self._config = bundle, bundle.config
        self._pad_token_id, self._dtype = pad_token_id, dtype
        self._model = bundle.load_model(dtype, torch.device("cpu"), progress)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, such as a question and its answer, in the model's chat template.

        Raises InputError when the template cannot render it.
        """
        return _encode_conversation(self._bundle, messages)

    @torch.inference_mode()
    def score(self, conversations: Sequence[Sequence[int]]) -> Tensor:
        """Apply the head to each conversation's last hidden state: [conversations, labels] float32.

        The last token is the last one that is not the config's pad_token_id, as in transformers. The scores
        of a conversation do not depend on the others. Raises InputError for a conversation that is empty or
        longer than `context_length`.
        """
        for ids in conversations:
            if not 0 < len(ids) <= self.context_length:
                raise InputError(
                    f"the conversation has {len(ids)} tokens; it must have 1 to {self.context_length}"
                )
        trimmed = [self._strip_padding(ids) for ids in conversations]
        scores = torch.empty(len(trimmed), len(self.labels))
        for indices in _batch_by_length([len(ids) for ids in trimmed]):
            scores[indices] = self._score_group([trimmed[index] for index in indices])
        return scores

    def _strip_padding(self, ids: Sequence[int]) -> Sequence[int]:
        """Remove trailing padding, to which no earlier token attends."""
        return ids[
            : max((index for index, token in enumerate(ids) if token != self._pad_token_id), default=0) + 1
        ]

    def _score_group(self, group: list[Sequence[int]]) -> Tensor:
        """Score conversations that fit one forward pass, or one long conversation in chunks.

        Either way every conversation ends in the last forward pass.
        """
        config, num_blocks = self._config, [-(-len(ids) // BLOCK_SIZE) for ids in group]
        block_ends = list(accumulate(num_blocks))
        block_tables = [
            list(range(end - count, end)) for count, end in zip(num_blocks, block_ends, strict=True)
        ]
        block_shape = (BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        cache = CPUPagedKVCache(
            config.num_layers, block_ends[-1], *block_shape, self._dtype, self._model.device
        )
        cache.zero_blocks(list(range(block_ends[-1])))
        for start in range(0, max(map(len, group)), MAX_BATCHED_TOKENS):
            chunk_ids = [ids[start : start + MAX_BATCHED_TOKENS] for ids in group]
            chunks = [
                SequenceChunk(start, len(ids), block_table)
                for ids, block_table in zip(chunk_ids, block_tables, strict=True)
            ]
            token_ids = [token for ids in chunk_ids for token in ids]
            rope_lengths = [
                rope_length
                for ids, chunk in zip(group, chunk_ids, strict=True)
                for rope_length in [config.rope.rope_length(len(ids))] * len(chunk)
            ]
            hidden_states = forward(self._model, chunks, token_ids, rope_lengths, cache)
        last_rows = [end - 1 for end in accumulate(map(len, chunk_ids))]
        return self._model.compute_logits(hidden_states[pad_rows(last_rows, hidden_states.device)])[
            : len(last_rows)
        ]


def _batch_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield batches of indices: similar lengths, MAX_BATCHED_TOKENS in total, or one longer conversation."""
    indices: list[int] = []
    num_tokens = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if indices and num_tokens + lengths[index] > MAX_BATCHED_TOKENS:
            yield indices
            indices, num_tokens = [], 0
        indices.append(index)
        num_tokens += lengths[index]
    if indices:
        yield indices
