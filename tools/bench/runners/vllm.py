"""vLLM as a contestant, on whatever device it was built for: plain, and K + 1 requests that know nothing of
one another, which is what steering costs an engine without branches before it has mixed anything.

Its engine lives in this process, as then it takes a hundredth of a core while it waits.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import vllm  # type: ignore[import-not-found] # it reads the environment as it is imported


class Peer:
    """vLLM's offline engine, its prefix cache off as trimtab's is."""

    def __init__(self, folder: str, dtype: str, rows: int, length: int, **_: Any) -> None:
        self._llm = vllm.LLM(
            folder,
            dtype=dtype,
            max_model_len=length,
            max_num_seqs=max(64, rows),
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self.about = {"version": vllm.__version__, "weights": f"the same folder, {dtype}"}

    def run(self, contestant: str, prompts: list[list[list[int]]], tokens: int) -> dict[str, Any]:
        """Decodes all prompts at once, greedily; "uncoupled" decodes all branches of them."""
        rows = [ids for prompt in prompts for ids in (prompt if contestant == "uncoupled" else prompt[:1])]
        params = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in rows], params, use_tqdm=False)
        return {"token_ids": [list(output.outputs[0].token_ids) for output in outputs]}
