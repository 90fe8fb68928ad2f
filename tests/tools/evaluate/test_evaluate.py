"""`trimtab evaluate` from its flags to its report, over the tiny model."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from trimtab.engine.engine import Engine
from trimtab.engine.methods.builtin import Mato, Prompt
from trimtab.engine.methods.objective import Objective
from trimtab.engine.request import Request
from trimtab.engine.sampling_params import SamplingParams
from trimtab.kernels.common.errors import InputError
from trimtab.tools.cli.main import main
from trimtab.tools.evaluate.study import answers_file
from trimtab.tools.evaluate.study import study as studies
from trimtab.tools.evaluate.study.settings import StudySettings

from ..conftest import CommandResult

AIMS = ("Be kind.=lexical:[aeiou]", "Be brief.=-length:characters")
FLAGS = ["--aim", AIMS[0], "--aim", AIMS[1], "--methods", "base,prompt,mato", "--weights", "3"]
SIZE = ["--limit", "3", "--max-tokens", "6", "--scorers", "repetition,perplexity,length"]
Evaluate = Callable[..., CommandResult]


@pytest.fixture(scope="module")
def flags(tiny_folder: Path) -> list[str]:
    return [*FLAGS, *SIZE, "--model", str(tiny_folder), "--kv-cache-memory", "2MiB"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def finished_study(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished study, for tests to copy."""
    folder = tmp_path_factory.mktemp("finished_study") / "out"
    assert main(["evaluate", *flags, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def study_copy(finished_study: Path, out: Path) -> Path:
    """A copy of the finished study that a test may change."""
    shutil.copytree(finished_study, out)
    return out


@pytest.fixture
def evaluate(run: Callable[..., CommandResult], flags: list[str], out: Path) -> Evaluate:
    """Run `trimtab evaluate` with the common flags and further ones."""
    return lambda *more: run("evaluate", *flags, "--output", str(out), *more)


def read_answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def read_report(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def test_a_study_writes_answers_a_report_and_two_plots(finished_study: Path) -> None:
    out = finished_study
    names = {
        "answers.jsonl",
        "answers.jsonl.gz",
        "dial.png",
        "pareto.png",
        "report.json",
        "report.md",
        "study.json",
    }
    assert {path.name for path in out.iterdir()} == names
    for plot in ("dial.png", "pareto.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    report = read_report(out)
    rows = {row["label"]: row for row in report["rows"]}
    assert list(rows) == [
        "base", "prompt", "prompt/percent", "prompt/words", "prompt/order", "prompt, all wordings", "mato",
    ]  # fmt: skip
    assert rows["mato"]["points"] == 3
    assert rows["base"]["wins"]["base"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert report["questions"]["count"] == 3
    assert set(report["provenance"]["reported"]) >= {"commit", "dirty", "packages", "machine"}
    text = (out / "report.md").read_text()
    assert "| mato |" in text
    assert report["command"] in text
    assert "--weights 3 is fewer than 7" in text
    verdict = text.splitlines()[2]
    assert verdict.startswith("**"), "the report begins with one sentence of verdict"
    assert verdict.count(".**") == 1
    assert "hypervolume" in verdict


def test_a_run_goes_on_from_the_compressed_answers(finished_study: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    (tmp_path / "answers.jsonl.gz").write_bytes((finished_study / "answers.jsonl.gz").read_bytes())
    answers_file.unpack(path)
    assert path.read_bytes() == (finished_study / "answers.jsonl").read_bytes()
    path.write_text("newer\n")
    answers_file.unpack(path)
    assert path.read_text() == "newer\n", "a run's own file is not overwritten"
    path.unlink()
    (tmp_path / "answers.jsonl.gz").write_bytes(b"\x1f\x8bno")
    with pytest.raises(InputError, match="is not a whole gzip file"):
        answers_file.unpack(path)
    assert not path.exists()


def test_an_answer_equals_the_engines_and_its_perplexity_is_that_of_the_base_branch(
    finished_study: Path, tiny: Engine
) -> None:
    out = finished_study
    study = studies.make_study(StudySettings(aim=AIMS, methods="base,prompt,mato", weights=3, limit=3))
    texts = {question.index: question.text for question in study.questions}
    weights = {"mato": [0.5, 0.5], "prompt": [1.0, 0.0]}
    steering = {
        "mato": Mato([Objective("Be kind.", 0.5), Objective("Be brief.", 0.5)]),
        "prompt": Prompt([Objective("Be kind.")]),
    }
    for method, made in steering.items():
        line = next(x for x in read_answers(out) if (x["method"], x["weights"]) == (method, weights[method]))
        output = tiny.generate(Request(texts[line["question"]], made, SamplingParams(max_tokens=6)))
        assert (line["text"], line["tokens"]) == (output.text, len(output.token_ids))
        prompt = output.branches[0].prompt_token_ids
        scored = tiny.score([*prompt, *output.token_ids])
        base_logprobs = [
            float(scored[len(prompt) - 1 + i, token]) for i, token in enumerate(output.token_ids)
        ]
        assert line["base_logprob"] == pytest.approx(sum(base_logprobs) / len(base_logprobs), abs=1e-4)
    points = read_report(out)["points"]
    base = next(point for point in points if point["label"] == "base")
    per_answer = sorted(math.exp(-x["base_logprob"]) for x in read_answers(out) if x["method"] == "base")
    assert base["measures"]["perplexity"]["value"] == pytest.approx(per_answer[1])


def test_an_objective_of_weight_zero_changes_no_token(tiny: Engine) -> None:
    both = Mato([Objective("Be kind."), Objective("Be brief.", 0.0)])
    one = Mato([Objective("Be kind.")])
    outputs = tiny.generate(
        [Request("What is rain?", made, SamplingParams(max_tokens=8)) for made in (both, one)]
    )
    assert outputs[0].token_ids == outputs[1].token_ids


def test_a_repeated_run_decodes_nothing_and_output_alone_rewrites_the_report(
    evaluate: Evaluate, run: Callable[..., CommandResult], study_copy: Path
) -> None:
    out = study_copy
    before = (out / "answers.jsonl").read_bytes()
    report = read_report(out)
    (out / "report.md").unlink()
    assert evaluate() == CommandResult(0, f"{out / 'report.md'}\n", "")
    assert run("evaluate", "--output", str(out)) == CommandResult(0, f"{out / 'report.md'}\n", "")
    assert (out / "answers.jsonl").read_bytes() == before
    again = read_report(out)
    for name in ("rows", "points", "ranges", "notes", "settings", "questions"):
        assert again[name] == report[name], name


def test_new_scorers_and_methods_reuse_existing_answers(evaluate: Evaluate, study_copy: Path) -> None:
    out = study_copy
    before = read_answers(out)
    assert evaluate("--methods", "base,prompt,mato,mixture", "--scorers", "vader").status == 0
    assert read_answers(out)[: len(before)] == before
    assert {line["method"] for line in read_answers(out)[len(before) :]} == {"mixture"}
    assert set(read_report(out)["rows"][0]["measures"]) >= {"length", "vader", "words"}


def test_requests_with_several_samples_wait_for_space_in_a_short_queue(evaluate: Evaluate, out: Path) -> None:
    drawn = ["--n", "4", "--temperature", "1", "--max-waiting", "5", "--max-num-seqs", "4"]
    assert evaluate(*drawn).status == 0
    assert {line["sample"] for line in read_answers(out)} == {0, 1, 2, 3}


def test_a_partially_written_answer_is_decoded_again(evaluate: Evaluate, study_copy: Path) -> None:
    out = study_copy
    path, complete = out / "answers.jsonl", read_answers(out)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    evaluate()
    assert read_answers(out)[:5] == complete[:5]
    assert sorted(map(json.dumps, read_answers(out))) == sorted(map(json.dumps, complete))


def test_an_interrupted_run_resumes_where_it_stopped(flags: list[str], evaluate: Evaluate, out: Path) -> None:
    command = [sys.executable, "-m", "trimtab", "evaluate", *flags, "--limit", "40", "--output", str(out)]
    path = out / "answers.jsonl"
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while time.monotonic() < end and not (path.exists() and path.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    before = read_answers(out)
    assert not (out / "report.json").exists()
    assert evaluate("--limit", "40").status == 0
    assert read_answers(out)[: len(before)] == before
    keys = [line["key"] for line in read_answers(out)]
    assert len(keys) == len(set(keys)) == 40 * 9


def test_a_study_can_be_repeated_from_its_report(
    evaluate: Evaluate, run: Callable[..., CommandResult], out: Path, tmp_path: Path
) -> None:
    evaluate("--temperature", "1", "--n", "2")
    other = tmp_path / "other"
    assert run("evaluate", "--from", str(out / "report.json"), "--output", str(other)).status == 0
    assert sorted(map(json.dumps, read_answers(other))) == sorted(map(json.dumps, read_answers(out)))
    assert read_report(other)["rows"] == read_report(out)["rows"]
    assert {line["sample"] for line in read_answers(out)} == {0, 1}
    texts = {line["text"] for line in read_answers(out) if line["question"] == 0 and line["method"] == "base"}
    assert len(texts) == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--max-tokens", "5"), "answers a request that is not in this study"),
        (("--limit", "2"), "answers a request that is not in this study"),
    ],
)
def test_answers_of_another_study_are_refused_and_left_unchanged(
    evaluate: Evaluate, study_copy: Path, more: tuple[str, str], says: str
) -> None:
    out = study_copy
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    ran = evaluate(*more)
    assert ran.status == 2
    assert says in ran.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("line", ['{"key": "x"}\n', "notes\n", "no", "[]\n"])
def test_a_file_of_another_format_is_refused_and_left_unchanged(
    evaluate: Evaluate, out: Path, line: str
) -> None:
    out.mkdir()
    (out / "answers.jsonl").write_text(line)
    ran = evaluate()
    assert ran.status == 2
    assert "line 1 of" in ran.stderr
    assert (out / "answers.jsonl").read_text() == line


def test_changed_questions_are_refused(
    run: Callable[..., CommandResult], flags: list[str], out: Path, tmp_path: Path
) -> None:
    file = tmp_path / "questions.json"
    file.write_text('["a?", "b?"]')
    assert run("evaluate", *flags, "--questions", str(file), "--output", str(out)).status == 0
    file.write_text('["a?", "c?"]')
    ran = run("evaluate", "--output", str(out))
    assert ran.status == 2
    assert "have changed since" in ran.stderr


def test_the_preferences_of_a_question_become_targets(
    run: Callable[..., CommandResult], tiny_folder: Path, out: Path, tmp_path: Path
) -> None:
    file = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"{word}?", "preferences": [f"Be {word}.", "Be brief."]} for word in ("odd", "even")]
    file.write_text("\n".join(map(json.dumps, rows)))
    made = ["--aim", "=length", "--methods", "base,mato", "--weights", "1", "--max-tokens", "4"]
    model = ["--model", str(tiny_folder), "--kv-cache-memory", "2MiB"]
    assert run("evaluate", *made, *model, "--questions", str(file), "--output", str(out)).status == 0
    assert [aim["label"] for aim in read_report(out)["aims"]] == ["length 1", "length 2"]
    assert {line["method"]: line["weights"] for line in read_answers(out)} == {
        "base": [0.5, 0.5],
        "mato": [0.5, 0.5],
    }


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "--output is required"),
        (("--output", "OUT"), "--aim is required"),
        (("--output", "OUT", "--aim", "Be kind."), "OBJECTIVE=SCORER"),
        (("--output", "OUT", "--aim", "Be kind.=length:miles"), "unknown unit 'miles'"),
        (("--output", "OUT", "--aim", "Be kind.=length", "--methods", "mat"), "unknown method 'mat'"),
        (("--output", "OUT", "--aim", "Be kind.=length", "--questions", "nowhere.json"), "nowhere.json"),
        (("--output", "OUT", "--from", "OUT/none.json"), "none.json"),
    ],
)
def test_invalid_flags_are_one_sentence_and_create_nothing(
    run: Callable[..., CommandResult], out: Path, more: tuple[str, ...], says: str
) -> None:
    ran = run("evaluate", *(word.replace("OUT", str(out)) for word in more))
    assert ran.status in (1, 2)
    assert says in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not out.exists()


def test_from_a_file_without_settings_is_refused(
    run: Callable[..., CommandResult], out: Path, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    for text in ("[]", "{}", '{"settings": {"aim": 5}}', '{"settings": {"nothing": 5}}', "{"):
        file.write_text(text)
        ran = run("evaluate", "--from", str(file), "--output", str(out))
        assert ran.status == 2, text
        assert "settings" in ran.stderr or "aim" in ran.stderr
    assert not out.exists()


class FakeJudgeHandler(BaseHTTPRequestHandler):
    """A judge that rates by prompt length, prefers the first answer, and counts requests in `asked`."""

    def do_GET(self) -> None:
        self._send({"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = json.dumps(body)
        self.server.asked += 1  # type: ignore[attr-defined]
        verdict = "first" if "better" in text.lower() else str(1 + len(text) % 5)
        self._send({"choices": [{"message": {"role": "assistant", "content": f"Verdict: {verdict}"}}]})

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def _send(self, response: dict[str, Any]) -> None:
        data = json.dumps(response).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def judge() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeJudgeHandler)
    server.asked = 0  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_judge_ratings_and_comparisons_are_cached(
    run: Callable[..., CommandResult], tiny_folder: Path, out: Path, judge: ThreadingHTTPServer
) -> None:
    url = f"judge:http://127.0.0.1:{judge.server_address[1]}/v1"
    aims = ["--aim", f"Be kind.={url}", "--aim", f"Be brief.={url}", "--pairwise", url]
    more = ["--methods", "base,mato", "--weights", "3", "--limit", "2", "--max-tokens", "4"]
    model = ["--model", str(tiny_folder), "--kv-cache-memory", "2MiB"]
    assert run("evaluate", *aims, *more, *model, "--output", str(out)).status == 0
    base, mato = read_report(out)["rows"]
    assert set(base["marks"]) == {"AMR", "APS", "Worst"}
    assert 1 <= mato["marks"]["Worst"]["value"] <= mato["marks"]["APS"]["value"] <= 5
    # the judge prefers the first answer, so the two orders disagree
    assert mato["judged"] == base["judged"] == {"base": {"value": 0.5, "low": 0.5, "high": 0.5}}
    assert "| judged vs base | AMR | APS | Worst |" in (out / "report.md").read_text()
    num_requests = judge.asked  # type: ignore[attr-defined]
    # two questions, four different answers to each (one of base, three of mato), two objectives
    assert num_requests >= 2 * 4 * 2
    assert run("evaluate", "--output", str(out)).status == 0
    assert judge.asked == num_requests  # type: ignore[attr-defined]
    assert read_report(out)["rows"] == [base, mato]
