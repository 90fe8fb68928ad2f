"""Model runner: one forward pass over all branches, then one steering step over all groups."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels.attention_metadata import SequenceChunk
from ...kernels.common.errors import RunError
from ...kernels.common.profiling import in_stage
from ...kernels.common.transfer import to_device, to_host_async
from ...kernels.cpu.row_padding import pad_rows
from ...kernels.reference.paged_kv_cache import PagedKVCache
from ...kernels.steering.layout import RequestLayout
from ...kernels.steering.state import SteeringState
from ...models.common.memory import oom_as_error
from ...models.forward import forward
from ..outputs import SampledToken
from .cuda_graphs import CUDAGraphRunner, make_graph_capturer
from .in_flight import InFlightStep
from .step_input import NewRequestData, StepInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ...kernels.backend import Backend, KVCache
    from ...kernels.steering.step import SamplerOutput
    from ...models.decoder import Decoder
    from ..scheduling.scheduler import SchedulerOutput
    from ..sequence.sequence import SequenceGroup


SCORE_CHUNK = 768
"""Tokens per chunk of logits in `score`; a multiple of 3, see `linear.invariant_rows`."""


@contextmanager
def inference_context() -> Iterator[None]:
    """Disable gradients and the dispatch of Tensor subclasses, which takes longer than some operations."""
    with torch.inference_mode(), torch._C.DisableTorchFunctionSubclass():
        yield


class ModelRunner:
    """The model, its KV cache and the steering state of running requests; `execute` runs one step.

    make_cache: makes a KV cache of the given number of blocks; `num_blocks` is that of this runner's cache.
    broadcast: context manager that sends a step to the other ranks and surrounds its execution.
    sample: see `kernels.lm_head.sample_from_hidden`. jit_monitor: counts the kernels that launches compile;
    None if the backend compiles none. cuda_graphs: the captured decode steps, or None.
    steps, step_seconds, steer_seconds: number of steps, host time in them, and the part of it in the LM head,
    steering and sampling; on a GPU, the time of their launches.
    """

    def __init__(
        self,
        model: Decoder,
        make_cache: Callable[[int], KVCache],
        num_blocks: int,
        steering_state: SteeringState,
        backend: Backend,
        broadcast: Callable[[StepInput], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self.make_cache, self.steering_state, self.broadcast = (
            model,
            make_cache,
            steering_state,
            broadcast,
        )
        self.num_blocks, self.cache, self.device = num_blocks, make_cache(num_blocks), model.device
        self.sample = in_stage("steer")(backend.sample)
        self.jit_monitor = backend.jit_monitor() if backend.jit_monitor else None
        self.cuda_graphs: CUDAGraphRunner | None = None
        self.steps, self.step_seconds, self.steer_seconds = 0, 0.0, 0.0
        self._prev_tokens = torch.zeros(0, dtype=torch.int64, device=self.device)  # of the previous step

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Make this runner's GPU the current device, and attribute compiles to this runner."""
        device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with device, self.jit_monitor.attribute_to_this_thread() if self.jit_monitor else nullcontext():
            yield

    def capture_graphs(self, max_num_seqs: int, max_model_len: int) -> None:
        """Capture decode steps of up to max_num_seqs rows and max_model_len tokens. GPU only."""
        assert isinstance(self.cache, PagedKVCache), "only PagedKVCache has a padding block"
        with inference_context(), self.on_device():
            self.cuda_graphs = CUDAGraphRunner(
                self.model, self.cache, max_num_seqs, max_model_len, make_graph_capturer()
            )
            torch.cuda.empty_cache()

    def add_request(self, new_request: NewRequestData) -> None:
        """Write a request's coefficients, weights and sampling into its row of the steering state."""
        self.steering_state.add_request(
            new_request.state_row, new_request.coefficients, new_request.weights, new_request.sampling
        )

    def execute(self, scheduler_output: SchedulerOutput) -> InFlightStep:
        """Launch a step; on a CPU it is complete on return.

        The next step may be launched before this one's result is read.
        """
        start = time.perf_counter()
        step_input = StepInput.from_scheduler_output(scheduler_output)
        with self.broadcast(step_input):
            sampler_output = self._execute(step_input)
        with inference_context(), self.on_device():
            wait_for_copy = _copy_to_host(sampler_output) if sampler_output else lambda: None
        if step_input.chunks:
            self.steps += 1
            self.step_seconds += time.perf_counter() - start

        def wait() -> SamplerOutput | None:
            start = time.perf_counter()
            result = wait_for_copy()
            self.step_seconds += time.perf_counter() - start
            return result

        return InFlightStep(scheduler_output, wait)

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each position, [tokens, vocab] float32 on the host.

        Raises RunError when the model returns NaN or GPU memory is too small for all tokens at once.
        """
        with self.broadcast(StepInput(score_token_ids=list(token_ids))):
            logprobs = self._compute_logprobs(token_ids)
        nonfinite = logprobs.isnan().any(-1).nonzero()[:, 0]
        if len(nonfinite):
            position = int(nonfinite[0]) + 1
            raise RunError(f"the model gave no finite score after token {position} of token_ids")
        return logprobs

    def execute_as_worker(self, step_input: StepInput) -> None:
        """Execute on this rank the step that rank 0 executes: the same calls, on another shard."""
        if step_input.score_token_ids:
            self._compute_logprobs(step_input.score_token_ids)
        else:
            self._execute(step_input)

    def _execute(self, step_input: StepInput) -> SamplerOutput | None:
        with inference_context(), self.on_device():
            return self._run_step(step_input)

    def _run_step(self, step_input: StepInput) -> SamplerOutput | None:
        for new_request in step_input.new_requests:
            self.add_request(new_request)
        self.cache.swap_blocks(step_input.blocks_to_swap)
        self.cache.zero_blocks(step_input.blocks_to_zero)
        if not step_input.chunks:
            return None
        hidden = self._forward(step_input)
        if hidden is None:
            return None
        start = time.perf_counter()
        sampler_output = self._sample(step_input, hidden)
        self._prev_tokens = sampler_output.tokens
        self.steer_seconds += time.perf_counter() - start
        return sampler_output

    def _forward(self, step_input: StepInput) -> torch.Tensor | None:
        """Hidden states of logits_indices and padding rows, [rows, hidden]; None without logits_indices."""
        prev_tokens = self._prev_tokens if step_input.uses_prev_tokens else None
        inputs = (step_input.chunks, step_input.token_ids, step_input.rope_lengths)
        hidden = self.cuda_graphs.run(*inputs, prev_tokens) if self.cuda_graphs else None
        if hidden is None:
            hidden = forward(self.model, *inputs, self.cache, prev_tokens)
        if not step_input.logits_indices:
            return None
        if self.device.type != "cpu" and step_input.logits_indices == list(
            range(len(step_input.logits_indices))
        ):
            return hidden[: len(step_input.logits_indices)]
        (indices,) = to_device(
            self.device, np.array(pad_rows(step_input.logits_indices, self.device), np.int64)
        )
        return hidden[indices]

    def _sample(self, step_input: StepInput, hidden: torch.Tensor) -> SamplerOutput:
        model, vocab_start = self.model, self.steering_state.shard.vocab_start
        return self.sample(
            model.lm_head,
            hidden,
            RequestLayout.from_branches(step_input.request_branches, self.device),
            self.steering_state,
            step_input.build_logit_edits(
                range(vocab_start, vocab_start + model.config.vocab_size), self.device
            ),
            trace=step_input.trace,
            top=step_input.top,
        )

    def _compute_logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        rope, shard = self.model.config.rope, self.steering_state.shard
        num_blocks = -(-len(token_ids) // self.cache.block_size)
        chunks = [SequenceChunk(0, len(token_ids), list(range(num_blocks)))]
        advice = "score fewer tokens at once, or lower gpu_memory_utilization"
        with inference_context(), self.on_device(), oom_as_error(self.device, advice):
            cache = self.make_cache(num_blocks)
            cache.zero_blocks(list(range(num_blocks)))
            rope_lengths = [rope.rope_length(len(token_ids))] * len(token_ids)
            hidden = forward(self.model, chunks, token_ids, rope_lengths, cache)
            logits_chunks = (self.model.compute_logits(chunk) for chunk in hidden.split(SCORE_CHUNK))
            return torch.cat([shard.all_gather(shard.log_softmax(part)).cpu() for part in logits_chunks])[
                : len(token_ids)
            ]


def _copy_to_host(sampler_output: SamplerOutput) -> Callable[[], SamplerOutput]:
    """Start one copy of the output to the host; the result waits for it. No copy on a CPU."""
    if sampler_output.tokens.device.type == "cpu":
        return lambda: sampler_output
    names = [field.name for field in fields(sampler_output) if field.name != "top_logprobs"]
    wait_for_copy = to_host_async(
        [*(getattr(sampler_output, name) for name in names), *(sampler_output.top_logprobs or ())]
    )

    def wait() -> SamplerOutput:
        tensors = wait_for_copy()
        top = (tensors[-2], tensors[-1]) if sampler_output.top_logprobs else None
        return replace(sampler_output, **dict(zip(names, tensors, strict=False)), top_logprobs=top)

    return wait


def split_output(sampler_output: SamplerOutput, groups: Sequence[SequenceGroup]) -> Iterator[SampledToken]:
    """Split the output of a step into one `SampledToken` per group, in the order of `groups`."""
    tokens, failed, logprobs = (
        sampler_output.tokens.tolist(),
        sampler_output.failed.tolist(),
        sampler_output.logprob.tolist(),
    )
    weights, rewards = sampler_output.weights.tolist(), sampler_output.rewards.tolist()
    fulfilment = sampler_output.fulfilment.tolist()
    strength, kl, branch_logprobs = (
        sampler_output.strength.tolist(),
        sampler_output.kl.tolist(),
        sampler_output.branch_logprobs.tolist(),
    )
    top_values, top_ids = (
        (tensor.tolist() for tensor in sampler_output.top_logprobs)
        if sampler_output.top_logprobs
        else ([], [])
    )
    offset = 0
    for index, group in enumerate(groups):
        num_objectives, num_branches = len(group.prompts) - 1, len(group.branches)
        yield SampledToken(
            token_id=tokens[index],
            failed=failed[index],
            logprob=logprobs[index],
            weights=weights[index][:num_objectives],
            rewards=rewards[index][:num_objectives],
            fulfilment=[_none_if_nan(value) for value in fulfilment[index][:num_objectives]],
            strength=strength[index],
            kl=_none_if_nan(kl[index]),
            branch_logprobs=branch_logprobs[offset : offset + num_branches],
            top_logprobs=list(zip(top_ids[index], top_values[index], strict=True)) if top_ids else [],
        )
        offset += num_branches


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
