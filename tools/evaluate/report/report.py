"""Write the output folder of a study: study.json at its start, the report and two plots at its end."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ....engine.utils.json import dumps
from ....kernels.common.errors import InputError
from ...common import questions
from ..metrics.statistics import NUM_DRAWS
from ..study.settings import STUDY_FILE
from . import markdown, plots, provenance

if TYPE_CHECKING:
    from pathlib import Path

    from ..metrics.result import Result
    from ..study.answers_file import Answers
    from ..study.study import Study

REPORT_FILE = "report.json"


def write_study_file(study: Study, folder: Path) -> None:
    """Write study.json before decoding starts. A resumed run adds its provenance to the earlier ones."""
    path = folder / STUDY_FILE
    description = {"settings": study.settings.to_dict(), "questions": _describe_questions(study)}
    previous = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    runs = [*previous.get("answered", []), provenance.collect_provenance()]
    distinct = [run for index, run in enumerate(runs) if run not in runs[:index]]
    _write_text(path, _format_json({**description, "answered": distinct}))


def check_same_questions(study: Study, source: Path) -> None:
    """Raise InputError if the questions changed since `source`, a study.json or report.json, was written."""
    previous = json.loads(source.read_text(encoding="utf-8")).get("questions", {})
    current = _describe_questions(study)
    same_source = all(previous.get(name) == current[name] for name in ("source", "half", "count"))
    if same_source and previous["digest"] != current["digest"]:
        raise InputError(
            f"the questions in {current['source']!r} have changed since {str(source)!r} was written"
        )


def write_report(study: Study, result: Result, answers: Answers, folder: Path, seed: int) -> None:
    """Write the report. `seed` is the bootstrap's."""
    answer_runs = json.loads((folder / STUDY_FILE).read_text(encoding="utf-8"))["answered"]
    metadata = {
        "command": f"trimtab evaluate {study.settings.command} --output {folder}",
        "settings": study.settings.to_dict(),
        "questions": _describe_questions(study),
        "bootstrap": {"draws": NUM_DRAWS, "seed": seed},
        "provenance": {"answered": answer_runs, "reported": provenance.collect_provenance()},
        "aims": [{**asdict(target), "label": target.label} for target in study.targets],
    }
    plots.draw_plots(study, result, *(_tmp_path(folder / name) for name in ("pareto.png", "dial.png")))
    for name in ("pareto.png", "dial.png"):
        os.replace(_tmp_path(folder / name), folder / name)
    _write_text(folder / "report.md", markdown.render_report(study, result, answers, metadata))
    _write_text(folder / REPORT_FILE, _format_json({**metadata, **asdict(result)}))


def _describe_questions(study: Study) -> dict[str, Any]:
    return {
        "source": study.settings.questions or "the project's own",
        "half": study.settings.half,
        "count": len(study.questions),
        "digest": questions.questions_digest(study.questions),
    }


def _format_json(value: Any) -> str:
    """Indented JSON; NaN and infinity become null."""
    return json.dumps(json.loads(dumps(value)), indent=1) + "\n"


def _write_text(path: Path, text: str) -> None:
    _tmp_path(path).write_text(text, encoding="utf-8")
    os.replace(_tmp_path(path), path)


def _tmp_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")
