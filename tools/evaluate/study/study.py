"""A study: questions × rows × weights, with equal requests merged."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ....engine.methods.builtin import Base
from ....engine.request import Request
from ....kernels.common.errors import InputError
from ...cli import common_args, method_args
from ...common import answer_digest
from ...common.questions import read_questions
from . import grid
from .row import Row, make_rows
from .target import Target, parse_targets

if TYPE_CHECKING:
    from ....engine.config import EngineConfig
    from ...common.questions import Question
    from .grid import Weights
    from .settings import StudySettings


@dataclass(frozen=True)
class Cell:
    """A request and its key. `label` and `weights` are of the first row and weights that make it."""

    key: str
    question: Question
    label: str
    weights: Weights
    request: Request


@dataclass(frozen=True)
class Study:
    """Questions × rows × weights, and the settings they come from."""

    settings: StudySettings
    questions: tuple[Question, ...]
    targets: tuple[Target, ...]
    rows: tuple[Row, ...]
    weights: tuple[Weights, ...]

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """Every distinct request by its key, grouped by question, whose prompts share a prefix."""
        cells: dict[str, Cell] = {}
        for cell in self._cells_by_position.values():
            cells.setdefault(cell.key, cell)
        return cells

    @property
    def scorers(self) -> tuple[str, ...]:
        """The names of all scorers, each once."""
        pairwise = [self.settings.pairwise] if self.settings.pairwise else []
        return tuple(
            dict.fromkeys(
                [*(target.scorer for target in self.targets), *self.settings.extra_scorers, *pairwise]
            )
        )

    def answer_key(self, row: Row, weights: Weights, question: Question) -> str:
        """The cell key of this row and question at these weights."""
        return self._cells_by_position[row.label, weights, question.index].key

    @cached_property
    def _cells_by_position(self) -> dict[tuple[str, Weights, int], Cell]:
        return {
            (row.label, weights, each.index): self._make_cell(row, weights, each)
            for each in self.questions
            for weights in self.weights
            for row in self.rows
        }

    def _make_cell(self, row: Row, weights: Weights, question: Question) -> Cell:
        method = row.make_method([target.objective_text(question) for target in self.targets], weights)
        sampling = self.settings.sampling_params
        if sampling.seed is not None:
            # Rows share the seed of a question; questions have different seeds.
            sampling = replace(sampling, seed=(sampling.seed + question.index * sampling.n) % 2**64)
        prompt = common_args.build_messages(question.text, self.settings.system)
        request = Request(prompt, method, sampling, trace=True)
        return Cell(_request_key(request, self.settings.engine_config), question, row.label, weights, request)


def make_study(settings: StudySettings) -> Study:
    """Create the study of these settings. Raises InputError for invalid settings."""
    if settings.fluent is not None and all(
        c.method is not Base for c in method_args.parse_methods(settings.methods)
    ):
        raise InputError("--fluent compares with base, which is not in --methods; add base")
    questions = read_questions(settings.questions, settings.half)[: settings.limit]
    targets = parse_targets(settings.aim, questions)
    return Study(
        settings,
        questions,
        targets,
        make_rows(method_args.parse_methods(settings.methods)),
        tuple(grid.simplex_grid(len(targets), settings.weights)),
    )


def _request_key(request: Request, config: EngineConfig) -> str:
    """A digest of everything that affects an answer."""
    return answer_digest.digest(
        {
            "messages": request.messages,
            "method": answer_digest.describe_method(request.steering),
            "sampling": asdict(request.sampling),
            "model": answer_digest.describe_model(config),
        }
    )
