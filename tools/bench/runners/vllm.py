"""Runner for vLLM, on the device it was built for: plain, and "uncoupled" with K + 1 independent requests.

The latter is the cost of steering in an engine without branches, before any mixing. The engine runs in this
process, where it uses a hundredth of a core while idle.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import vllm  # type: ignore[import-not-found] # reads the environment at import


class Peer:
    """vLLM's offline engine, with the prefix cache off, as in trimtab's runner."""

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
        """Decode all prompts greedily at once; "uncoupled" decodes all branches as separate requests."""
        rows = [ids for prompt in prompts for ids in (prompt if contestant == "uncoupled" else prompt[:1])]
        params = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in rows], params, use_tqdm=False)
        return {"token_ids": [list(output.outputs[0].token_ids) for output in outputs]}
