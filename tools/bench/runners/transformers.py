"""Runner for transformers: `generate`, plain and with `guidance_scale`, and the literal Amulet loop.

The loop follows the Amulet paper literally, without a KV cache: for every token two forward passes over the
full sequences, then T = 60 steps of Follow-the-Regularised-Leader, each on a vector over the vocabulary. Only
the logits of the last position are computed, which is cheaper than in the authors' code.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

ALPHA, LAM, ETA, NUM_STEPS = 2.0, 2.0, 10.0, 60


class Peer:
    """A transformers model."""

    def __init__(self, folder: str, dtype: str, guidance_scale: float, **_: Any) -> None:
        loader: Any = transformers.AutoModelForCausalLM
        self._model = loader.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self._model.generation_config.eos_token_id = None  # so that every answer has the maximum length
        self._guidance_scale = guidance_scale
        self.about = {
            "version": transformers.__version__,
            "threads": torch.get_num_threads(),
            "weights": f"the same folder, {dtype}",
        }

    @torch.inference_mode()
    def run(self, contestant: str, prompts: list[list[list[int]]], tokens: int) -> dict[str, Any]:
        """Decode all prompts greedily: in one padded batch, or one at a time in the literal Amulet loop."""
        if contestant == "amulet":
            return {"token_ids": [self._decode_amulet(prompt[0], prompt[1], tokens) for prompt in prompts]}
        base = [prompt[0] for prompt in prompts]
        if contestant == "guidance":
            ids, mask = _left_pad([prompt[1] for prompt in prompts])
            negative, negative_mask = _left_pad(base)
            output_ids = self._model.generate(
                ids,
                attention_mask=mask,
                negative_prompt_ids=negative,
                negative_prompt_attention_mask=negative_mask,
                guidance_scale=self._guidance_scale,
                max_new_tokens=tokens,
                do_sample=False,
            )
        else:
            ids, mask = _left_pad(base)
            output_ids = self._model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False
            )
        return {"token_ids": output_ids[:, ids.shape[1] :].tolist()}

    def _decode_amulet(self, base: list[int], steered: list[int], tokens: int) -> list[int]:
        output_ids: list[int] = []
        for _ in range(tokens):
            scores = follow_the_leader(
                self._logprobs(base + output_ids), self._logprobs(steered + output_ids)
            )
            output_ids.append(int(scores.argmax()))
        return output_ids

    def _logprobs(self, ids: list[int]) -> torch.Tensor:
        logits = self._model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
        logprobs: torch.Tensor = logits.float().log_softmax(-1)
        return logprobs


def follow_the_leader(base: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """log π_T of Amulet from log-probabilities [vocab] without and with the objective, in T steps.

    U_t = α (log π_{t−1} − b), log π_t ≃ [λ p + (1/t) Σ U_s + log π_{t−1} / (η t)] / [λ + 1 / (η t)].
    """
    policy, utilities = anchor, torch.zeros_like(anchor)
    for t in range(1, NUM_STEPS + 1):
        utilities = utilities + ALPHA * (policy - base)
        policy = (LAM * anchor + utilities / t + policy / (ETA * t)) / (LAM + 1 / (ETA * t))
        policy = policy.log_softmax(-1)
    return policy


def _left_pad(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, [prompts, max_len], padded on the left."""
    max_len = max(map(len, prompts))
    ids = [[0] * (max_len - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (max_len - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)
