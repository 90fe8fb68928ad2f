"""`trimtab evaluate`: measure how well each method follows weighted objectives, and its cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError
from ..cli import common_args
from . import scorers
from .study import settings

if TYPE_CHECKING:
    import argparse

    from ..cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add --output, --from, and the study, sampling and model flags."""
    scorer_help = "; ".join(f"{name}: {meaning}" for name, (_, _, meaning) in scorers.SCORERS.items())
    parser.epilog = (
        f"Scorers, as NAME or NAME:ARGUMENT: {scorer_help}. "
        "To resume an interrupted run, pass the same --output. With --output alone, the study in that folder "
        "is completed and its report rewritten. Sampling uses seed 0 unless --seed is set."
    )
    parser.add_argument("--output", metavar="FOLDER", help="folder for the answers and the report")
    parser.add_argument(
        "--from", dest="source", metavar="FILE", help="repeat the study of this report.json, into --output"
    )
    settings.add_study_flags(parser)
    common_args.add_sampling(parser, skip=settings.IGNORED_SAMPLING_FIELDS)
    common_args.add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Run the study; return 1 if an answer failed. All arguments are checked before the model is loaded."""
    if args.output is None:
        raise InputError("--output is required: the folder for the answers and the report")
    # Not needed for --help.
    from . import run_study  # noqa: PLC0415
    from .report import report  # noqa: PLC0415
    from .study import study  # noqa: PLC0415

    folder = Path(args.output)
    source = _settings_source(args, folder)
    eval_study = study.make_study(
        settings.settings_from_args(args, settings.settings_from_file(source) if source else None)
    )
    if source:
        report.check_same_questions(eval_study, source)
    return run_study.run_study(eval_study, folder)


def _settings_source(args: argparse.Namespace, folder: Path) -> Path | None:
    """The file with the initial settings: that of --from, or, without --aim, the folder's study file."""
    if args.source is not None:
        return Path(args.source)
    study_file = folder / settings.STUDY_FILE
    return study_file if study_file.exists() and "aim" not in args else None
