"""What is decoded: how long prompts and answers are, and which requests are steered."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...engine.methods.base import Method
from ...engine.methods.builtin import Base
from ...engine.request import Request
from ...engine.sampling_params import SamplingParams
from ...engine.utils.fields import check_fields, option, require_fields
from ...kernels.common.errors import InputError
from ..cli import flags, method_args

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


@dataclass(frozen=True)
class Traffic:
    """Fields as vLLM's benches have them, and how much of it is steered."""

    input_len: int = option(128, "tokens of a prompt; every branch of a request has as many")
    output_len: int = option(64, "tokens of an answer, at least 2")
    steered_share: float = option(1.0, "share of the requests that --method and --prefer steer")
    seed: int = option(0, "seed of what is drawn: prompts, and when requests come")

    def __post_init__(self) -> None:
        check_fields(self)
        require_fields(
            self,
            ("input_len", self.input_len >= 1, "a whole number ≥ 1"),
            ("output_len", self.output_len >= 2, "at least 2: a first token, and one that is decoded"),
            ("steered_share", 0 <= self.steered_share <= 1, "from 0 to 1"),
        )

    @property
    def mean_len(self) -> float:
        """Tokens that stand before a decoded one, on average."""
        return self.input_len + self.output_len / 2

    def is_steered(self, index: int) -> bool:
        """Whether request `index` is: of the first n the share, rounded down, evenly among the others."""
        return int((index + 1) * self.steered_share) > int(index * self.steered_share)

    def rows(self, count: int, method: Method) -> int:
        """The branches of that many requests."""
        return count + _wishes(method) * sum(map(self.is_steered, range(count)))

    def requests(self, count: int, vocab: int, method: Method) -> Iterator[list[Request]]:
        """Again and again that many requests, whose prompts are random ids below `vocab`.

        No two branches have anything in common, so that none finds its prompt computed: the dearest case.
        """
        draw = random.Random(self.seed)
        while True:
            yield self._requests(count, vocab, method, draw)

    def _requests(self, count: int, vocab: int, method: Method, draw: random.Random) -> list[Request]:
        params = SamplingParams(max_tokens=self.output_len, ignore_eos=True)
        found = []
        for index in range(count):
            chosen = method if self.is_steered(index) else Base()
            branches = [
                [draw.randrange(vocab) for _ in range(self.input_len)] for _ in range(1 + _wishes(chosen))
            ]
            found.append(Request(branch_token_ids=branches, steering=chosen, sampling=params, trace=False))
        return found


def asked(args: argparse.Namespace) -> tuple[Traffic, method_args.Choice, Method]:
    """The traffic, how it is steered, and the method that does it; without wishes all of it is plain.

    Raises InputError for a value out of range, and for a share of steered requests without a method.
    """
    wishes = method_args.wishes(args)
    traffic = Traffic(**flags.given(Traffic, args))
    choice = method_args.choice(args, wishes)
    method = choice.toward(wishes)
    if not method.objectives:
        if vars(args).get("steered_share") and traffic.steered_share > 0:
            raise InputError(
                f"steered_share is {traffic.steered_share:g}, but there is no wish to steer to; "
                'give one with --prefer "TEXT=WEIGHT"'
            )
        traffic = replace(traffic, steered_share=0.0)
    return traffic, choice, method


def _wishes(method: Method) -> int:
    return len(method.branches())
