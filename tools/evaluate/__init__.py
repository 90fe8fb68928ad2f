"""`trimtab evaluate`: how far each method turns toward objectives, and what it costs."""

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
    """--output, --from, and the flags of study, sampling and model."""
    scorer_help = "; ".join(f"{name}: {meaning}" for name, (_, _, meaning) in scorers.SCORERS.items())
    parser.epilog = (
        f"Scorers, as NAME or NAME:ARGUMENT: {scorer_help}. "
        "A run that was interrupted goes on where it stopped: give the same --output. With --output alone "
        "the study in that folder is completed and reported again. Draws have seed 0 unless --seed is given."
    )
    parser.add_argument("--output", metavar="FOLDER", help="where answers and report are kept")
    parser.add_argument(
        "--from", dest="source", metavar="FILE", help="repeat the study of this report.json, into --output"
    )
    settings.add_study_flags(parser)
    common_args.add_sampling(parser, skip=settings.IGNORED_SAMPLING_FIELDS)
    common_args.add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Everything typed is checked before the model is loaded. 1 when an answer failed."""
    if args.output is None:
        raise InputError("there is no --output; name the folder for answers and report")
    # What follows is not needed for --help.
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
    """Where settings start from: the file of --from, else, without --aim, what the folder has."""
    if args.source is not None:
        return Path(args.source)
    study_file = folder / settings.STUDY_FILE
    return study_file if study_file.exists() and "aim" not in args else None
