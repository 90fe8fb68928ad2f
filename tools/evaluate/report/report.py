"""What a study leaves in its folder: study.json when it begins; at its end a report and two pictures."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ....engine.utils.json import dumps
from ....kernels.common.errors import InputError
from ...common import questions
from ..metrics.statistics import DRAWS
from ..study.settings import STUDY
from . import markdown, plots, provenance

if TYPE_CHECKING:
    from pathlib import Path

    from ..metrics.result import Result
    from ..study.study import Study

REPORT = "report.json"


def begin(study: Study, folder: Path) -> None:
    """Keeps what the study is, before anything is decoded; a run that goes on keeps when it began."""
    path = folder / STUDY
    found = {"settings": study.settings.described(), "questions": _questions(study)}
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    runs = [*before.get("answered", []), provenance.described()]
    distinct = [run for place, run in enumerate(runs) if run not in runs[:place]]
    _write_text(path, _pretty({**found, "answered": distinct}))


def check(study: Study, source: Path) -> None:
    """Raises InputError when the study asks other questions than that of a study.json or report.json did."""
    before = json.loads(source.read_text(encoding="utf-8")).get("questions", {})
    now = _questions(study)
    same = all(before.get(name) == now[name] for name in ("source", "half", "count"))
    if same and before["digest"] != now["digest"]:
        raise InputError(f"{now['source']!r} holds other questions than when {str(source)!r} was made")


def write(study: Study, result: Result, folder: Path, seed: int) -> None:
    """Writes the report. `seed` is that of the bootstrap."""
    answered = json.loads((folder / STUDY).read_text(encoding="utf-8"))["answered"]
    facts = {
        "command": f"trimtab evaluate {study.settings.command} --output {folder}",
        "settings": study.settings.described(),
        "questions": _questions(study),
        "bootstrap": {"draws": DRAWS, "seed": seed},
        "provenance": {"answered": answered, "reported": provenance.described()},
        "aims": [{**asdict(aim), "label": aim.label} for aim in study.aims],
    }
    plots.draw(study, result, *(_beside(folder / name) for name in ("pareto.png", "dial.png")))
    for name in ("pareto.png", "dial.png"):
        os.replace(_beside(folder / name), folder / name)
    _write_text(folder / "report.md", markdown.render(study, result, facts))
    _write_text(folder / REPORT, _pretty({**facts, **asdict(result)}))


def _questions(study: Study) -> dict[str, Any]:
    return {
        "source": study.settings.questions or "the project's own",
        "half": study.settings.half,
        "count": len(study.questions),
        "digest": questions.digest(study.questions),
    }


def _pretty(value: Any) -> str:
    """JSON for people and programs; numbers that JSON does not have are null."""
    return json.dumps(json.loads(dumps(value)), indent=1) + "\n"


def _write_text(path: Path, text: str) -> None:
    _beside(path).write_text(text, encoding="utf-8")
    os.replace(_beside(path), path)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")
