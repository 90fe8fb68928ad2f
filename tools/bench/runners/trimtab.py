"""Runner for trimtab. It uses public names only, so that it works with other commits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import trimtab
from trimtab import Amulet, Base, Engine, Guidance, Mato, Objective, Request, SamplingParams

SAMPLED_PARAMS = {"temperature": 0.8, "top_p": 0.95, "seed": 1}


class Peer:
    """An engine. `wishes` are objectives [[text, weight], …]; methods for one objective take the first."""

    def __init__(self, model: str, dtype: str, wishes: list[tuple[str, float]], rows: int, **_: Any) -> None:
        self._engine = Engine.from_pretrained(
            model, dtype=dtype, enable_prefix_caching=False, max_num_seqs=max(48, rows)
        )
        objectives = tuple(Objective(*wish) for wish in wishes)
        self._methods: dict[str, tuple[Any, dict[str, Any]]] = {
            "base": (Base(), {}),
            "guidance": (Guidance(objectives[:1]), {}),
            "amulet": (Amulet(objectives[:1]), {}),
            "mato": (Mato(objectives), {}),
            "mato sampled": (Mato(objectives), SAMPLED_PARAMS),
            "mato kl_budget=0.2": (Mato(objectives, kl_budget=0.2), {}),
        }
        self.about = {
            "version": trimtab.__version__,
            "threads": torch.get_num_threads(),
            "package": str(Path(trimtab.__file__).resolve().parent),
            "guidance_scale": Guidance(objectives[:1]).guidance_scale,
        }

    def render(self, prompts: list[str]) -> list[list[list[int]]]:
        """The token ids of each prompt's branches: without an objective, then with each."""
        method = self._methods["mato"][0]
        branch_lists = (self._engine.render(Request(prompt, method)) for prompt in prompts)
        return [[branch.prompt_token_ids for branch in branches] for branches in branch_lists]

    def run(self, contestant: str, prompts: list[list[list[int]]], tokens: int) -> dict[str, Any]:
        """Decode all prompts at once. "decoding" is the longest time after the first token."""
        method, sampling = self._methods[contestant]
        num_branches = 1 + len(method.weights())
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, **sampling)
        # False: no trace, as in the other engines
        request_args = ((prompt[:num_branches], False) for prompt in prompts)
        outputs = self._engine.generate([Request(None, method, params, *args) for args in request_args])
        if failed := [output.error for output in outputs if output.error]:
            raise RuntimeError(failed[0])
        return {
            "token_ids": [output.token_ids for output in outputs],
            "decoding": max(output.timings.decode for output in outputs),
        }
