"""Turn a request into sequence groups: render prompts, check the model's limits, set seeds."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from ...kernels.common.errors import ContextError, InputError, short_repr
from ...models.chat.prompts import BranchPrompt, render_branches
from ..request import Request
from ..sampling_params import NO_TOKEN_LIMIT
from ..sequence.output_processor import OutputState
from ..sequence.sequence import Branch, SequenceGroup
from ..utils.fields import coerce

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ...models.chat.template import ChatTemplate
    from ...models.layers.rotary_embedding import Rope
    from ...models.tokenizer.tokenizer import Tokenizer
    from ..scheduling.block_manager import BlockManager


class InputProcessor:
    """Validate requests and make their sequence groups; errors give the value and the limit."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        block_manager: BlockManager,
        max_model_len: int,
        max_num_seqs: int,
        vocab_size: int,
        seed: int | None,
        rope: Rope,
    ) -> None:
        self._tokenizer, self._template, self._block_manager = tokenizer, template, block_manager
        self._max_model_len, self._max_num_seqs, self._vocab_size, self._rope = (
            max_model_len,
            max_num_seqs,
            vocab_size,
            rope,
        )
        self._rng = random.SystemRandom() if seed is None else random.Random(seed)

    def create_groups(self, request: Request) -> list[SequenceGroup]:
        """Make one group for each of the request's n answers. Raises InputError if the request is invalid."""
        coerce("a request", request, Request)
        for ids in request.branch_token_ids or ():
            self.check_ids("branch_token_ids", ids)
        self._check_num_branches(1 + len(request.steering.branch_objectives()))
        prompts = self._render_prompts(request)
        max_prompt_len = max(len(prompt.prompt_token_ids) for prompt in prompts)
        max_new_tokens = min(request.sampling.max_tokens, self._max_model_len - max_prompt_len)
        self.check_ids("logit_bias", request.sampling.logit_bias)
        self.check_ids("stop_token_ids", request.sampling.stop_token_ids)
        base_seed = request.sampling.seed if request.sampling.seed is not None else self._rng.getrandbits(63)
        seeds = (base_seed + n - (2**64 if base_seed + n >= 2**64 else 0) for n in range(request.sampling.n))
        return [self._create_group(request, prompts, max_new_tokens, n, seed) for n, seed in enumerate(seeds)]

    def check_score_ids(self, ids: Sequence[int]) -> None:
        """Raise InputError when the ids are empty, exceed the context or are outside the vocabulary."""
        if not 0 < len(ids) <= self._max_model_len:
            raise InputError(f"token_ids has {len(ids)} ids; it must have 1 to {self._max_model_len}")
        self.check_ids("token_ids", ids)

    def check_ids(self, name: str, ids: Iterable[int]) -> None:
        """Raise InputError for an id outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self._vocab_size:
                raise InputError(
                    f"{name} has token id {short_repr(token)}; "
                    f"the model's ids are 0 to {self._vocab_size - 1}",
                    name if name.isidentifier() else "",
                )

    def _render_prompts(self, request: Request) -> list[BranchPrompt]:
        objectives = request.steering.branch_objectives()
        if request.branch_token_ids is not None:
            names = ("base", *objectives)
            decode = self._tokenizer.decode
            prompts = [
                BranchPrompt(name, decode(ids, skip_special_tokens=False), list(ids))
                for name, ids in zip(names, request.branch_token_ids, strict=True)
            ]
            for prompt in prompts:
                self._check_prompt_length(prompt)
            return prompts
        return render_branches(
            self._template,
            self._tokenizer,
            request.messages,
            objectives,
            request.steering.placement,
            request.chat_template_kwargs,
            self._check_prompt_length,
        )

    def _check_num_branches(self, num_branches: int) -> None:
        """Called before prompts are rendered, which takes time."""
        if num_branches > self._max_num_seqs:
            raise InputError(
                f"the request has {num_branches} branches; max_num_seqs allows {self._max_num_seqs} at once"
            )

    def _check_prompt_length(self, prompt: BranchPrompt) -> None:
        name, prompt_len = short_repr(prompt.name), len(prompt.prompt_token_ids)
        if not prompt_len:
            raise InputError(f"the prompt of branch {name} has no tokens; it needs at least one")
        if prompt_len >= self._max_model_len:
            raise ContextError(
                f"the prompt of branch {name} has {prompt_len} tokens; with at least one token of answer it "
                f"must fit max_model_len, which is {self._max_model_len}"
            )
        self.check_ids(f"the prompt of branch {name}", prompt.prompt_token_ids)

    def _create_group(
        self, request: Request, prompts: list[BranchPrompt], max_new_tokens: int, sample_index: int, seed: int
    ) -> SequenceGroup:
        output_state = OutputState(self._tokenizer, request.sampling, request.trace)
        branches = [Branch(index, prompts[index].prompt_token_ids) for index in active_branches(request)]
        rope_length = self._rope.rope_length(max(len(prompt.prompt_token_ids) for prompt in prompts))
        group = SequenceGroup(
            request, prompts, branches, output_state, sample_index, seed, max_new_tokens, rope_length
        )
        self._fit_to_cache(group)
        return group

    def _fit_to_cache(self, group: SequenceGroup) -> None:
        """Check that the longest answer fits in the KV cache; an answer without a limit gets the cache's.

        Raises InputError where the limit that was set, or one token of answer, does not fit.
        """
        cache, asked = self._block_manager, group.max_new_tokens
        num_blocks = cache.max_blocks(group)
        if num_blocks <= cache.num_blocks:
            return
        low, high = 0, asked  # the answer fits with `low` tokens, and not with `high`
        while high - low > 1:
            group.max_new_tokens = (low + high) // 2
            fits = cache.max_blocks(group) <= cache.num_blocks
            low, high = (group.max_new_tokens, high) if fits else (low, group.max_new_tokens)
        group.max_new_tokens = low
        if low and group.request.sampling.max_tokens >= NO_TOKEN_LIMIT:
            return
        advice = f"lower max_tokens to at most {low}" if low else "shorten the prompt"
        needs = f"{num_blocks} blocks of {cache.block_size} tokens for an answer of {asked}"
        raise InputError(
            f"the request needs {needs}, and the KV cache has {cache.num_blocks}; {advice}, or raise "
            "kv_cache_memory",
            "max_tokens" if low else "",
        )


def active_branches(request: Request) -> list[int]:
    """Indices of the branches to decode: all if traced, else those that affect the scores."""
    coefficients, weights = request.steering.cached_coefficients, request.steering.weights()
    num_objectives = len(request.steering.branch_objectives())
    if request.trace:
        return list(range(num_objectives + 1))
    base = [0] if coefficients.needs_base else []
    return base + [k + 1 for k in range(num_objectives) if coefficients.objective_coef and weights[k]]
