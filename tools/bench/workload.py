"""What is decoded: how long prompts and answers are, and which requests are steered."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...engine.methods.base import Method
from ...engine.methods.builtin import Base
from ...engine.request import Request
from ...engine.sampling_params import SamplingParams
from ...engine.utils.fields import config_field, validate_rules, validate_types
from ...kernels.common.errors import InputError
from ..cli import flags, method_args

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


@dataclass(frozen=True)
class WorkloadConfig:
    """Fields as vLLM's benches have them, and how much of it is steered."""

    input_len: int = config_field(128, "tokens of a prompt; every branch of a request has as many")
    output_len: int = config_field(64, "tokens of an answer, at least 2")
    steered_share: float = config_field(1.0, "share of the requests that --method and --prefer steer")
    seed: int = config_field(0, "seed of what is drawn: prompts, and when requests come")

    def __post_init__(self) -> None:
        validate_types(self)
        validate_rules(
            self,
            ("input_len", self.input_len >= 1, "a whole number ≥ 1"),
            ("output_len", self.output_len >= 2, "at least 2: a first token, and one that is decoded"),
            ("steered_share", 0 <= self.steered_share <= 1, "from 0 to 1"),
        )

    @property
    def mean_context_len(self) -> float:
        """Tokens that stand before a decoded one, on average."""
        return self.input_len + self.output_len / 2

    def is_steered(self, index: int) -> bool:
        """Whether request `index` is: of the first n the share, rounded down, evenly among the others."""
        return int((index + 1) * self.steered_share) > int(index * self.steered_share)

    def num_rows(self, num_requests: int, method: Method) -> int:
        """The branches of that many requests."""
        return num_requests + _num_objectives(method) * sum(map(self.is_steered, range(num_requests)))

    def request_batches(self, num_requests: int, vocab_size: int, method: Method) -> Iterator[list[Request]]:
        """Again and again that many requests, whose prompts are random ids below `vocab_size`.

        No two branches have anything in common, so that none finds its prompt computed: the dearest case.
        """
        rng = random.Random(self.seed)
        while True:
            yield self._make_batch(num_requests, vocab_size, method, rng)

    def _make_batch(
        self, num_requests: int, vocab_size: int, method: Method, rng: random.Random
    ) -> list[Request]:
        params = SamplingParams(max_tokens=self.output_len, ignore_eos=True)
        requests = []
        for index in range(num_requests):
            request_method = method if self.is_steered(index) else Base()
            branches = [
                [rng.randrange(vocab_size) for _ in range(self.input_len)]
                for _ in range(1 + _num_objectives(request_method))
            ]
            requests.append(
                Request(branch_token_ids=branches, steering=request_method, sampling=params, trace=False)
            )
        return requests


def workload_from_args(args: argparse.Namespace) -> tuple[WorkloadConfig, method_args.MethodSpec, Method]:
    """The traffic, how it is steered, and the method that does it; without objectives all of it is plain.

    Raises InputError for a value out of range, and for a share of steered requests without a method.
    """
    objectives = method_args.parse_objectives(args)
    load = WorkloadConfig(**flags.fields_from_args(WorkloadConfig, args))
    method_spec = method_args.method_from_args(args, objectives)
    method = method_spec.build_compatible(objectives)
    if not method.objectives:
        if vars(args).get("steered_share") and load.steered_share > 0:
            raise InputError(
                f"steered_share is {load.steered_share:g}, but there is no objective to steer to; "
                'give one with --prefer "TEXT=WEIGHT"'
            )
        load = replace(load, steered_share=0.0)
    return load, method_spec, method


def _num_objectives(method: Method) -> int:
    return len(method.branch_objectives())
