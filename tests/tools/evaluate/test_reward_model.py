"""Reward model scorer against transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trimtab.kernels.common.errors import InputError
from trimtab.tools.evaluate.scorers import make_scorer
from trimtab.tools.evaluate.scorers.answer import Answer

from ...helpers.tiny_model import write_json
from ...models.test_classifier import write_classifier

if TYPE_CHECKING:
    from pathlib import Path

ANSWER = Answer("Why is the sky blue?", ("Be brief.",), (1.0,), "Air scatters blue light.", 6, -1.0, "stop")
TEXTS = ("Air scatters blue light.", "Nobody knows.", "It is not. " * 20, "Ask it. <|im_end|>")
ALTERNATING = (
    "{% for m in messages %}{% if m['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


def test_scores_match_transformers(tmp_path: Path) -> None:
    write_classifier(tmp_path)
    reward = make_scorer(f"reward:{tmp_path}")
    assert (reward.name, reward.scale) == (f"reward:{tmp_path}", None)
    ours = reward.score([replace(ANSWER, text=text) for text in TEXTS[:3]])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text, score in zip(TEXTS[:3], ours, strict=True):
        talk = [{"role": "user", "content": ANSWER.question}, {"role": "assistant", "content": text}]
        ids = tokenizer.encode(tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False)
        with torch.inference_mode():
            assert score == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-4)
    assert len(set(ours)) == 3


def test_an_unscorable_answer_has_no_score_and_does_not_affect_others(tmp_path: Path) -> None:
    write_classifier(tmp_path)
    reward = make_scorer(f"reward:{tmp_path}")
    answers = [replace(ANSWER, text=text) for text in (*TEXTS, " \n", "so " * 600)]
    scores = reward.score(answers)
    assert [score is None for score in scores] == [False] * 4 + [True] * 2
    assert reward.score(answers[::-1]) == scores[::-1]
    assert reward.score([]) == []


def test_a_template_that_takes_only_one_question_and_answer_works(tmp_path: Path) -> None:
    write_classifier(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": ALTERNATING})
    assert make_scorer(f"reward:{tmp_path}").score([ANSWER]) != [None]


def test_a_template_that_renders_no_conversation_is_refused_on_loading(tmp_path: Path) -> None:
    write_classifier(tmp_path)
    write_json(
        tmp_path / "tokenizer_config.json", {"chat_template": "{{ raise_exception('not a chat') }}{{ 1 }}"}
    )
    with pytest.raises(InputError, match="cannot render this conversation: not a chat"):
        make_scorer(f"reward:{tmp_path}")


def test_a_model_with_several_labels_is_refused_with_their_names(tmp_path: Path) -> None:
    named = {"id2label": {0: "helpful", 1: "true"}, "label2id": {"helpful": 0, "true": 1}, "num_labels": 2}
    write_classifier(tmp_path, fields=named)
    with pytest.raises(InputError, match=r"scores 2 labels \('helpful', 'true'\); a reward model has one"):
        make_scorer(f"reward:{tmp_path}")


def test_a_missing_argument_an_empty_folder_and_a_causal_model_are_refused(
    tmp_path: Path, tiny_folder: Path
) -> None:
    for text, message in (
        ("reward", "needs a folder with a reward model: reward:PATH"),
        (f"reward:{tmp_path}", "has no config.json"),
        (f"reward:{tiny_folder}", "has a LlamaForCausalLM, which generates text"),
    ):
        with pytest.raises(InputError, match=message):
            make_scorer(text)
