"""Who takes part in `trimtab bench peers`, and what is compared with what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...common import statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .process import Worker

Prompts = list[list[list[int]]]
"""By prompt and branch, the base first: token ids."""


@dataclass(frozen=True)
class Contestant:
    """One way to decode. peer: whose worker does it; asks: what that calls it; single: a prompt at a time."""

    name: str
    peer: str
    asks: str
    single: bool = False


@dataclass(frozen=True)
class Ratio:
    """Ours / theirs, as tokens a second; equal: both are to choose the same tokens.

    Between two of ours the time after the first token is compared, else whole calls, prompt included.
    """

    ours: str
    theirs: str
    equal: bool = False


CONTESTANTS = (
    Contestant("trimtab base", "trimtab", "base"),
    Contestant("trimtab guidance", "trimtab", "guidance"),
    Contestant("trimtab amulet", "trimtab", "amulet"),
    Contestant("trimtab mato", "trimtab", "mato"),
    Contestant("trimtab mato sampled", "trimtab", "mato sampled"),
    Contestant("trimtab mato kl_budget=0.2", "trimtab", "mato kl_budget=0.2"),
    Contestant("transformers plain", "transformers", "plain"),
    Contestant("transformers guidance", "transformers", "guidance", single=True),
    Contestant("amulet literal", "transformers", "amulet", single=True),
    Contestant("vllm plain", "vllm", "plain"),
    Contestant("vllm uncoupled", "vllm", "uncoupled"),
    Contestant("llama.cpp plain", "llama_cpp", "plain", single=True),
)
RATIOS = (
    Ratio("trimtab base", "transformers plain", equal=True),
    Ratio("trimtab guidance", "transformers guidance", equal=True),
    Ratio("trimtab mato", "transformers guidance"),
    Ratio("trimtab amulet", "amulet literal", equal=True),
    Ratio("trimtab base", "vllm plain", equal=True),
    Ratio("trimtab mato", "vllm uncoupled"),
    Ratio("trimtab base", "llama.cpp plain", equal=True),
    Ratio("trimtab mato", "trimtab base"),
    Ratio("trimtab mato sampled", "trimtab mato"),
    Ratio("trimtab mato kl_budget=0.2", "trimtab mato"),
)


@dataclass
class Score:
    """What a contestant has done. Seconds, an entry a round: whole calls, and where it says so decoding."""

    contestant: Contestant
    whole: list[float] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)

    def play(self, worker: Worker, prompts: Prompts, tokens: int, batch: int, counts: bool) -> None:
        """Decodes all prompts, `batch` at a time. A round that does not count warms up."""
        answers: list[dict[str, Any]] = [
            worker.ask(
                "run", contestant=self.contestant.asks, prompts=prompts[at : at + batch], tokens=tokens
            )
            for at in range(0, len(prompts), batch)
        ]
        self.token_ids = [ids for answer in answers for ids in answer["token_ids"]]
        if counts:
            self.whole.append(sum(answer["seconds"] for answer in answers))
            if all("decoding" in answer for answer in answers):
                self.decoding.append(sum(answer["decoding"] for answer in answers))

    def rates(self, tokens: int) -> list[float]:
        """Tokens a second of whole calls."""
        return [tokens / seconds for seconds in self.whole]


def compared(ratio: Ratio, scores: dict[str, Score]) -> dict[str, Any]:
    """A ratio within each round, and the share of tokens that are the same where they should be."""
    ours, theirs = scores[ratio.ours], scores[ratio.theirs]
    pair = (ours.decoding, theirs.decoding)
    values = [b / a for a, b in zip(*(pair if all(pair) else (ours.whole, theirs.whole)), strict=True)]
    found: dict[str, Any] = {"median": statistics.median(values), "values": values}
    if ratio.equal:
        found["equal"] = equal_share(ours.token_ids, theirs.token_ids)
    return found


def equal_share(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The share of places at which two lists of answers have the same token."""
    places = [a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(places) / len(places)
