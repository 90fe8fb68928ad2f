"""The workload of a bench: lengths of prompts and answers, and which requests are steered."""

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
    """Lengths and seed, with the names of vLLM's benches, and the fraction of steered requests."""

    input_len: int = config_field(128, "tokens of the prompt of each branch")
    output_len: int = config_field(64, "tokens of an answer, at least 2")
    steered_share: float = config_field(1.0, "fraction of requests steered by --method and --prefer")
    seed: int = config_field(0, "seed of the random prompts and arrival times")

    def __post_init__(self) -> None:
        validate_types(self)
        validate_rules(
            self,
            ("input_len", self.input_len >= 1, "an integer ≥ 1"),
            ("output_len", self.output_len >= 2, "at least 2: the first token comes from prefill"),
            ("steered_share", 0 <= self.steered_share <= 1, "from 0 to 1"),
        )

    @property
    def mean_context_len(self) -> float:
        """Mean number of tokens before a decoded one."""
        return self.input_len + self.output_len / 2

    def is_steered(self, index: int) -> bool:
        """Whether request `index` is steered: floor(n · steered_share) of the first n are, evenly spaced."""
        return int((index + 1) * self.steered_share) > int(index * self.steered_share)

    def num_rows(self, num_requests: int, method: Method) -> int:
        """Total branches of `num_requests` requests."""
        return num_requests + _num_objectives(method) * sum(map(self.is_steered, range(num_requests)))

    def request_batches(self, num_requests: int, vocab_size: int, method: Method) -> Iterator[list[Request]]:
        """Yield batches of `num_requests` requests forever, with random prompt ids below `vocab_size`.

        Branches share no prefix, so the prefix cache never hits: the most expensive case.
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
    """The workload, the method's settings and the method. Without objectives no request is steered.

    Raises InputError for a value out of range, or a positive --steered-share without objectives.
    """
    objectives = method_args.parse_objectives(args)
    load = WorkloadConfig(**flags.fields_from_args(WorkloadConfig, args))
    method_spec = method_args.method_from_args(args, objectives)
    method = method_spec.build_compatible(objectives)
    if not method.objectives:
        if vars(args).get("steered_share") and load.steered_share > 0:
            raise InputError(
                f"steered_share is {load.steered_share:g}, which needs an objective; "
                'give one with --prefer "TEXT=WEIGHT"'
            )
        load = replace(load, steered_share=0.0)
    return load, method_spec, method


def _num_objectives(method: Method) -> int:
    return len(method.branch_objectives())
