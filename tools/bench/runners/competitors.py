"""The contestants of `trimtab bench peers`, and the speed ratios between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...common import statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .process import RunnerProcess

Prompts = list[list[list[int]]]
"""Token ids by prompt and branch, the base branch first."""


@dataclass(frozen=True)
class Competitor:
    """An engine with a decoding variant. runner: the runner module; variant: its name there; one_prompt_only:
    no batches.
    """

    name: str
    runner: str
    variant: str
    one_prompt_only: bool = False


@dataclass(frozen=True)
class SpeedRatio:
    """Ours / theirs in tokens per second; expect_equal: both should generate the same tokens.

    Between two trimtab contestants the decode times are compared, else whole calls, prefill included.
    """

    ours: str
    theirs: str
    expect_equal: bool = False


COMPETITORS = (
    Competitor("trimtab base", "trimtab", "base"),
    Competitor("trimtab guidance", "trimtab", "guidance"),
    Competitor("trimtab amulet", "trimtab", "amulet"),
    Competitor("trimtab mato", "trimtab", "mato"),
    Competitor("trimtab mato sampled", "trimtab", "mato sampled"),
    Competitor("trimtab mato kl_budget=0.2", "trimtab", "mato kl_budget=0.2"),
    Competitor("transformers plain", "transformers", "plain"),
    Competitor("transformers guidance", "transformers", "guidance", one_prompt_only=True),
    Competitor("amulet literal", "transformers", "amulet", one_prompt_only=True),
    Competitor("vllm plain", "vllm", "plain"),
    Competitor("vllm uncoupled", "vllm", "uncoupled"),
    Competitor("llama.cpp plain", "llama_cpp", "plain", one_prompt_only=True),
)
RATIOS = (
    SpeedRatio("trimtab base", "transformers plain", expect_equal=True),
    SpeedRatio("trimtab guidance", "transformers guidance", expect_equal=True),
    SpeedRatio("trimtab mato", "transformers guidance"),
    SpeedRatio("trimtab amulet", "amulet literal", expect_equal=True),
    SpeedRatio("trimtab base", "vllm plain", expect_equal=True),
    SpeedRatio("trimtab mato", "vllm uncoupled"),
    SpeedRatio("trimtab base", "llama.cpp plain", expect_equal=True),
    SpeedRatio("trimtab mato", "trimtab base"),
    SpeedRatio("trimtab mato sampled", "trimtab mato"),
    SpeedRatio("trimtab mato kl_budget=0.2", "trimtab mato"),
)


@dataclass
class CompetitorResult:
    """Results of a contestant: seconds per round of whole calls and, where reported, of decoding."""

    competitor: Competitor
    call_times: list[float] = field(default_factory=list)
    decode_times: list[float] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)

    def run_round(
        self, worker: RunnerProcess, prompts: Prompts, num_tokens: int, batch_size: int, record: bool
    ) -> None:
        """Decode all prompts, `batch_size` at a time. A warm-up round does not record its times."""
        answers: list[dict[str, Any]] = [
            worker.request(
                "run",
                contestant=self.competitor.variant,
                prompts=prompts[start : start + batch_size],
                tokens=num_tokens,
            )
            for start in range(0, len(prompts), batch_size)
        ]
        self.token_ids = [ids for answer in answers for ids in answer["token_ids"]]
        if record:
            self.call_times.append(sum(answer["seconds"] for answer in answers))
            if all("decoding" in answer for answer in answers):
                self.decode_times.append(sum(answer["decoding"] for answer in answers))

    def tokens_per_second(self, num_tokens: int) -> list[float]:
        """Tokens per second of whole calls."""
        return [num_tokens / seconds for seconds in self.call_times]


def compute_ratio(ratio: SpeedRatio, results: dict[str, CompetitorResult]) -> dict[str, Any]:
    """The ratio of each round and, where tokens should be equal, the fraction that are."""
    ours, theirs = results[ratio.ours], results[ratio.theirs]
    decode_times = (ours.decode_times, theirs.decode_times)
    values = [
        b / a
        for a, b in zip(
            *(decode_times if all(decode_times) else (ours.call_times, theirs.call_times)), strict=True
        )
    ]
    summary: dict[str, Any] = {"median": statistics.median(values), "values": values}
    if ratio.expect_equal:
        summary["equal"] = token_match_rate(ours.token_ids, theirs.token_ids)
    return summary


def token_match_rate(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The fraction of positions at which two lists of answers have the same token."""
    matches = [a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(matches) / len(matches)
