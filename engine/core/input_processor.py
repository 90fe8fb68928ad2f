"""From a request to its branch groups: rendered, checked against the model's limits, seeded."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from ...kernels.common.errors import ContextError, InputError, quoted
from ...models.chat.prompts import BranchPrompt, render_branches
from ..request import Request
from ..sequence.output_processor import Answer
from ..sequence.sequence import Branch, Group
from ..utils.fields import fitted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ...models.chat.template import ChatTemplate
    from ...models.layers.rotary_embedding import Rope
    from ...models.tokenizer.tokenizer import Tokenizer
    from ..scheduling.block_manager import KVBlocks


class Admission:
    """The door: what passes can be decoded; what cannot is refused here with the numbers."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        blocks: KVBlocks,
        max_length: int,
        max_rows: int,
        vocab: int,
        seed: int | None,
        rope: Rope,
    ) -> None:
        self._tokenizer, self._template, self._blocks = tokenizer, template, blocks
        self._max_length, self._max_rows, self._vocab, self._rope = max_length, max_rows, vocab, rope
        self._random = random.SystemRandom() if seed is None else random.Random(seed)

    def groups(self, request: Request) -> list[Group]:
        """One group for each of the request's n answers. Raises InputError when it cannot be decoded."""
        fitted("a request", request, Request)
        for ids in request.branch_token_ids or ():
            self.check_ids("branch_token_ids", ids)
        self._require_rows(1 + len(request.steering.branches()))
        prompts = self._prompts(request)
        longest = max(len(prompt.prompt_token_ids) for prompt in prompts)
        limit = min(request.sampling.max_tokens, self._max_length - longest)
        self.check_ids("logit_bias", request.sampling.logit_bias)
        self.check_ids("stop_token_ids", request.sampling.stop_token_ids)
        first = request.sampling.seed if request.sampling.seed is not None else self._random.getrandbits(63)
        seeds = (first + n - (2**64 if first + n >= 2**64 else 0) for n in range(request.sampling.n))
        return [self._group(request, prompts, limit, n, seed) for n, seed in enumerate(seeds)]

    def check_scored(self, ids: Sequence[int]) -> None:
        """Raises InputError when there are no ids, more than fit the context, or one that the model lacks."""
        if not 0 < len(ids) <= self._max_length:
            raise InputError(f"token_ids has {len(ids)} ids; it must have 1 to {self._max_length}")
        self.check_ids("token_ids", ids)

    def check_ids(self, name: str, ids: Iterable[int]) -> None:
        """Raises InputError when there is one that the model does not have."""
        for token in ids:
            if not 0 <= token < self._vocab:
                raise InputError(
                    f"{name} has token id {quoted(token)}; the model's ids are 0 to {self._vocab - 1}",
                    name if name.isidentifier() else "",
                )

    def _prompts(self, request: Request) -> list[BranchPrompt]:
        wishes = request.steering.branches()
        if request.branch_token_ids is not None:
            names = ("base", *wishes)
            decode = self._tokenizer.decode
            found = [
                BranchPrompt(name, decode(ids, skip_special_tokens=False), list(ids))
                for name, ids in zip(names, request.branch_token_ids, strict=True)
            ]
            for prompt in found:
                self._require_fit(prompt)
            return found
        return render_branches(
            self._template,
            self._tokenizer,
            request.messages,
            wishes,
            request.steering.placement,
            request.chat_template_kwargs,
            self._require_fit,
        )

    def _require_rows(self, branches: int) -> None:
        """Before any prompt is made: each costs time."""
        if branches > self._max_rows:
            raise InputError(
                f"the request has {branches} branches; max_num_seqs allows {self._max_rows} at once"
            )

    def _require_fit(self, prompt: BranchPrompt) -> None:
        name, length = quoted(prompt.name), len(prompt.prompt_token_ids)
        if not length:
            raise InputError(f"the prompt of branch {name} has no tokens; it needs at least one")
        if length >= self._max_length:
            raise ContextError(
                f"the prompt of branch {name} has {length} tokens; with a token of answer at least it must "
                f"fit max_model_len, which is {self._max_length}"
            )
        self.check_ids(f"the prompt of branch {name}", prompt.prompt_token_ids)

    def _group(
        self, request: Request, prompts: list[BranchPrompt], limit: int, sample: int, seed: int
    ) -> Group:
        answer = Answer(self._tokenizer, request.sampling, request.trace)
        branches = [Branch(index, prompts[index].prompt_token_ids) for index in running_branches(request)]
        turned_by = self._rope.turned_by(max(len(prompt.prompt_token_ids) for prompt in prompts))
        group = Group(request, prompts, branches, answer, sample, seed, limit, turned_by)
        pages = self._blocks.most(group)
        if pages > self._blocks.total:
            raise InputError(
                f"the request needs {pages} pages of {self._blocks.block_size} tokens, and the KV cache has "
                f"{self._blocks.total}; raise kv_cache_memory or lower max_tokens"
            )
        return group


def running_branches(request: Request) -> list[int]:
    """Which branches are decoded: all when traced, else those that can change the scores."""
    program, weights = request.steering.compiled, request.steering.weights()
    objectives = len(request.steering.branches())
    if request.trace:
        return list(range(objectives + 1))
    needed = [0] if program.needs_base else []
    return needed + [k + 1 for k in range(objectives) if program.scale and weights[k]]
