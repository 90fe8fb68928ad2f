"""`trimtab bench peers`: the same prompts and the same weights on other engines, in turn.

Each engine runs in a separate process, in the Python environment that --peer names, and all but the measured
one are stopped. Every round runs all contestants once, so that drift of the machine affects all of them.
Ratios are computed within each round; their median, minimum and maximum are printed. Decoding is greedy
unless the contestant says "sampled", with answers of equal length. Peers that are not installed are listed
as skipped.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine.config import DTYPES
from ...engine.utils.fields import config_field, validate_rules, validate_types
from ...engine.utils.json import dumps
from ...kernels.common.errors import InputError
from ...models.loader.resolve import resolve_folder
from ..cli import flags, method_args
from ..cli.terminal import log_line
from ..common import environment, statistics
from .runners.competitors import COMPETITORS, RATIOS, Competitor, CompetitorResult, Prompts, compute_ratio
from .runners.process import MissingPackageError, RunnerProcess

if TYPE_CHECKING:
    import argparse

    from ..cli.parser import Parser

QUESTION_TEMPLATE = (
    "What happens if an earthworm is cut in {} parts? Answer at length and kindly, with examples, "
    "so that a child can follow it."
)
OBJECTIVES = (("Your answer should be uplifting.", 0.7), ("Your answer should be one short sentence.", 0.3))
RUNNERS = {"trimtab": "trimtab", "transformers": "transformers", "vllm": "vllm", "llama.cpp": "llama_cpp"}
"""Runner modules by the names that --peer takes."""


@dataclass(frozen=True)
class PeersConfig:
    """Settings common to all contestants."""

    model: str = config_field("demo", "'demo', a folder, or a .gguf file, which llama.cpp reads directly")
    gguf: str | None = config_field(None, "a GGUF file of the same model for llama.cpp")
    dtype: str = config_field("bfloat16", "type of the weights", DTYPES[1:])
    output_len: int = config_field(64, "tokens of each answer, at least 2")
    num_prompts: int = config_field(2, "prompts per contestant and round, up to 90")
    batch_size: int = config_field(
        1, "prompts decoded at once; contestants that support only one are left out of larger batches"
    )
    rounds: int = config_field(5, "measured rounds, after one warm-up round")

    def __post_init__(self) -> None:
        validate_types(self)
        validate_rules(
            self,
            ("output_len", self.output_len >= 2, "at least 2: the first token comes from prefill"),
            ("num_prompts", 1 <= self.num_prompts <= 90, "an integer from 1 to 90"),
            (
                "batch_size",
                1 <= self.batch_size <= self.num_prompts,
                f"from 1 to num_prompts ({self.num_prompts})",
            ),
            ("rounds", self.rounds >= 1, "an integer ≥ 1"),
            ("gguf", self.gguf is None or Path(self.gguf).is_file(), "an existing file"),
        )


def add_arguments(parser: Parser) -> None:
    group = flags.add_fields(parser, "peers", PeersConfig)
    method_args.add_prefer(group)
    group.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"the Python interpreter of a peer ({', '.join(RUNNERS)}); default: this one "
        "(may be given several times)",
    )
    group.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAME",
        help="leave out contestants whose name starts with NAME, such as amulet (may be given several times)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises RunError when an installed contestant fails."""
    config = PeersConfig(**flags.fields_from_args(PeersConfig, args))
    objectives = [
        (objective.text, objective.weight) for objective in method_args.parse_objectives(args)
    ] or list(OBJECTIVES)
    pythons = dict(_parse_peer(text) for text in args.peer)
    competitors = _select_competitors(args.skip, config.batch_size)
    with ExitStack() as stack:
        runner_info, workers, prompts = _open_runners(
            stack, config, objectives, pythons, {each.runner for each in competitors}
        )
        results = _run_rounds(
            config, workers, prompts, [each for each in competitors if each.runner in workers]
        )
    ratios = {
        f"{ratio.ours} / {ratio.theirs}": compute_ratio(ratio, results)
        for ratio in RATIOS
        if ratio.ours in results and ratio.theirs in results
    }
    num_tokens = config.num_prompts * config.output_len
    print("\n".join(_format_lines(runner_info, results, ratios, num_tokens)))
    metadata = {
        "bench": "peers",
        "config": {**asdict(config), "wishes": objectives},
        **environment.run_metadata(),
    }
    raw = {
        name: {
            "whole": result.call_times,
            "decoding": result.decode_times,
            "rates": result.tokens_per_second(num_tokens),
        }
        for name, result in results.items()
    }
    prompt_lens = [[len(ids) for ids in prompt] for prompt in prompts]
    print(
        dumps({**metadata, "peers": runner_info, "prompt_tokens": prompt_lens, "ratios": ratios, "raw": raw})
    )
    return 0


def _run_rounds(
    config: PeersConfig, workers: dict[str, RunnerProcess], prompts: Prompts, competitors: list[Competitor]
) -> dict[str, CompetitorResult]:
    """The results of all rounds, by contestant name."""
    results = {competitor.name: CompetitorResult(competitor) for competitor in competitors}
    for index in range(config.rounds + 1):
        log_line(f"round {index} of {config.rounds}" if index else "warming up")
        for result in results.values():
            worker = workers[result.competitor.runner]
            result.run_round(worker, prompts, config.output_len, config.batch_size, record=index > 0)
    return results


def _parse_peer(text: str) -> tuple[str, str]:
    name, sep, python = text.partition("=")
    if not sep or not python or name not in RUNNERS:
        raise InputError(f"--peer is {text!r}; it must be like vllm=/path/to/python, of {', '.join(RUNNERS)}")
    return RUNNERS[name], python


def _select_competitors(skip_prefixes: list[str], batch_size: int) -> list[Competitor]:
    """The contestants to run. Raises InputError for a --skip that matches no contestant."""
    for name in skip_prefixes:
        if not any(each.name.startswith(name) for each in COMPETITORS):
            known_names = ", ".join(each.name for each in COMPETITORS)
            raise InputError(f"--skip is {name!r}; contestants are {known_names}")
    selected = [each for each in COMPETITORS if not any(each.name.startswith(name) for name in skip_prefixes)]
    return [each for each in selected if batch_size == 1 or not each.one_prompt_only]


def _open_runners(
    stack: ExitStack,
    config: PeersConfig,
    objectives: list[tuple[str, float]],
    pythons: dict[str, str],
    needed: set[str],
) -> tuple[dict[str, dict[str, Any]], dict[str, RunnerProcess], Prompts]:
    """Return each peer's description, the runners of the installed peers, and the prompts' branches.

    trimtab always starts first: it downloads or converts the model, and renders the prompts.
    """
    num_rows = config.batch_size * (1 + len(objectives))
    engine_options: dict[str, Any] = {
        "model": config.model,
        "dtype": config.dtype,
        "wishes": objectives,
        "rows": num_rows,
    }
    trimtab_process = stack.enter_context(RunnerProcess("trimtab", pythons.get("trimtab", sys.executable)))
    about = trimtab_process.request("open", **engine_options)["about"]
    runner_info: dict[str, dict[str, Any]] = {
        "trimtab": {**about, "folder": str(resolve_folder(config.model).resolve())}
    }
    questions = [QUESTION_TEMPLATE.format(10 + index) for index in range(config.num_prompts)]
    prompts: Prompts = trimtab_process.request("render", prompts=questions)["prompts"]
    max_prompt_len = max(len(ids) for prompt in prompts for ids in prompt)
    gguf = config.gguf or (config.model if config.model.lower().endswith(".gguf") else None)
    engine_options |= {**runner_info["trimtab"], "length": max_prompt_len + config.output_len, "gguf": gguf}
    workers = {"trimtab": trimtab_process}
    for runner in dict.fromkeys(
        competitor.runner for competitor in COMPETITORS if competitor.runner in needed - {"trimtab"}
    ):
        if runner == "llama_cpp" and gguf is None:
            runner_info[runner] = {"skipped": "it needs a GGUF file; name one with --gguf"}
            continue
        process = stack.enter_context(RunnerProcess(runner, pythons.get(runner, sys.executable)))
        try:
            runner_info[runner] = process.request("open", **engine_options)["about"]
            workers[runner] = process
        except MissingPackageError as error:
            runner_info[runner] = {"skipped": f"{error}; name a Python that has it with --peer"}
    return runner_info, workers, prompts


def _format_lines(
    runner_info: dict[str, dict[str, Any]],
    results: dict[str, CompetitorResult],
    ratios: dict[str, dict[str, Any]],
    num_tokens: int,
) -> list[str]:
    """The results as lines of text."""
    lines = []
    for runner, info in runner_info.items():
        threads = f"{info['threads']} threads" if "threads" in info else ""
        details = [info.get("version", ""), threads, info.get("weights", "")]
        text = f"skipped: {info['skipped']}" if "skipped" in info else ", ".join(filter(None, details))
        lines.append(statistics.format_row(runner, text))
    for name, result in results.items():
        lines.append(
            statistics.format_row(
                f"{name}, tok/s", statistics.format_spread(result.tokens_per_second(num_tokens))
            )
        )
    for name, ratio in ratios.items():
        equal_text = f", {ratio['equal']:.0%} of tokens equal" if "equal" in ratio else ""
        lines.append(statistics.format_row(name, statistics.format_spread(ratio["values"]) + equal_text))
    return lines
