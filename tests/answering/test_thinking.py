"""Models that think before they answer: what of their text is the answer, and where the rest is kept."""

import json
import shutil

import pandas as pd
import pytest
from tiny_models import tiny_tokenizer
from transformers import AddedToken

import generate as script
from soteria.answering import generation
from soteria.answering.columns import model_settings
from soteria.answering.generation import all_inputs, answer_questions
from soteria.answering.thinking import split_thinking, texts_of
from soteria.languages import find_language
from soteria.models.loading import LoadedModel
from soteria.storage.csv_files import read_table, write_table

ENGLISH = find_language("en")
CAN_THINK = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        (" plain\n", "", " plain\n"),
        ("", "", ""),
        ("<think>\nHarmful steps?\n</think>\n\nNo.", "Harmful steps?", "No."),
        ("Harmful steps?\n</think>\n\nNo.", "Harmful steps?", "No."),  # the template opened it
        ("<think>\n\n</think>\n\nNo.", "", "No."),
        ("<think>Harmful steps, which", "Harmful steps, which", ""),  # cut off
        ("<thinking>a</thinking>b", "a", "b"),
        ("b <think>a</think> b <THINK>a</THINK> b", "aa", "b  b  b"),
        ("[THINK]a[/THINK]b", "a", "b"),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", "a", "b"),
        ("Think: <b>a</b>", "", "Think: <b>a</b>"),
    ],
)
def test_thinking_is_told_from_the_answer(text, thinking, answer):
    assert split_thinking(text) == (thinking, answer)


def test_many_tags_keep_nobody_busy():
    for piece in ("<think>", "</think>", "<think>a</think>"):
        split_thinking(piece * 20_000)


def test_tags_that_are_special_tokens_and_one_that_the_prompt_opens_are_kept():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("[THINK]", special=True), AddedToken("[/THINK]", special=True)])
    prompts = [tokenizer(text).input_ids for text in ("hot?", "hot? <think>\n", "<think> hot?", "hot?[THINK]")]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in ("[THINK]a[/THINK]b</s>", "a", "b", "a")]
    assert texts_of(tokenizer, prompts, ids)[1:] == ["<think>\na", "b", "[THINK]a"]
    assert split_thinking(texts_of(tokenizer, prompts, ids)[0])[0] == "a"


def test_a_template_that_can_switch_thinking_off_does(tiny_loaded):
    loaded, tokenizer = tiny_loaded("llama"), tiny_tokenizer()
    tokenizer.chat_template = CAN_THINK
    thinker = LoadedModel("thinker", loaded.model, tokenizer, loaded.geometry)
    assert tokenizer.decode(all_inputs(thinker, ["hot?"], ENGLISH, True)[0]).endswith("<think>\n\n</think>\n\n")


def test_settings_say_that_thinking_is_off_only_where_the_template_knows_of_it(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    assert "enable_thinking" not in model_settings(str(folder), ENGLISH, 6, True)
    (folder / "chat_template.jinja").write_text(CAN_THINK)
    assert model_settings(str(folder), ENGLISH, 6, True)["enable_thinking"] is False
    assert "enable_thinking" not in model_settings(str(folder), ENGLISH, 6, False)


@pytest.fixture
def says(monkeypatch):
    """`says(texts)`: what every model writes from here on, row by row."""

    def patch(*texts: str) -> None:
        monkeypatch.setattr(generation, "generate", lambda *_: iter([dict(enumerate(texts))]))

    return patch


def test_thinking_is_kept_in_a_column_of_its_own(says, run_script, tiny_folder, tmp_path, caplog):
    write_table(pd.DataFrame({"question": ["hot?", "cold?", "old?"]}), tmp_path / "asked.csv")
    words = ["--model", tiny_folder("llama"), "--dataset", tmp_path / "asked.csv", "--language", "en"]
    words += ["--output", tmp_path / "a.csv", "--device", "cpu"]
    says("<think>It is.</think>Hot.", "Cold.", "<think>It")
    assert run_script(script, *words, "--column", "SAFE ANSWER") == 0
    says("a", "b", "c")
    assert run_script(script, *words, "--column", "BASE ANSWER") == 0
    table = read_table(tmp_path / "a.csv")
    assert list(table.columns) == ["Question", "SAFE ANSWER", "BASE ANSWER", "SAFE THINKING"]
    assert list(table["SAFE ANSWER"]) == ["Hot.", "Cold.", ""] and list(table["SAFE THINKING"]) == ["It is.", "", "It"]
    assert "1 of 3 answers are thinking only" in caplog.text
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == 3
    says("d", "e", "f")
    assert run_script(script, *words, "--column", "SAFE ANSWER", "--max_new_tokens", "5") == 0
    assert list(read_table(tmp_path / "a.csv").columns) == ["Question", "SAFE ANSWER", "BASE ANSWER"]


def test_answers_to_questions_are_without_thinking(says, tiny_loaded):
    says("<think>It is.</think>Hot.")
    assert answer_questions(tiny_loaded("llama"), ["hot?"], ENGLISH) == ["Hot."]
