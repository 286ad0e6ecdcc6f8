"""The preset of the original release: how it asks, samples and judges, in generate.py and in a grid."""

import json
import shutil

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

import generate as script
from soteria.answering.generation import all_inputs
from soteria.answering.questions import RELEASE
from soteria.grid.grid_file import Grid
from soteria.languages import find_language
from soteria.models.loading import load_model
from soteria.storage.csv_files import read_table, write_table
from soteria.storage.journal import Journal
from soteria.storage.paths import BASE_ANSWER, SAFE_ANSWER

HINDI, QUESTIONS = find_language("hi"), ["hot or cold?", "भारत?", "small or big, old or new?"]
GRID = {"name": "g", "models": [{"base": "b", "tuned": "t"}], "languages": ["en"], "scaling_factor": 2}
GRID |= {"prompt_sets": ["policy"], "preset": "release"}


@pytest.fixture
def sampler(tiny_folder, tmp_path):
    """A model whose generation config samples."""
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "sampler")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True, "temperature": 1.5, "top_k": 0}))
    return folder


@pytest.fixture
def ask(run_script, sampler, tmp_path):
    """`ask(output, *words)` answers QUESTIONS in Hindi and gives the answers."""
    write_table(pd.DataFrame({"question": QUESTIONS}), tmp_path / "asked.csv")

    def run(output: str, *words: object, column: str = SAFE_ANSWER, status: int = 0) -> list[str]:
        given = ["--model", sampler, "--dataset", tmp_path / "asked.csv", "--language", "hi", "--device", "cpu"]
        assert run_script(script, *given, "--output", tmp_path / output, "--column", column, *words) == status
        return [] if status else list(read_table(tmp_path / output)[column])

    return run


def test_instruction_and_question_are_joined_and_the_model_samples_as_it_is_configured_to(ask, sampler, tmp_path):
    found, tokenizer = (
        ask("a.csv", "--preset", "release", "--max_new_tokens", 9),
        AutoTokenizer.from_pretrained(sampler),
    )
    loaded = load_model(str(sampler), "cpu")
    assert found != ask("greedy.csv", "--max_new_tokens", 9)
    for row, question in enumerate(QUESTIONS):
        ids = tokenizer(HINDI.instruction + question, return_tensors="pt").input_ids
        assert all_inputs(loaded, [question], HINDI, False, RELEASE) == ids.tolist()
        torch.manual_seed(row)
        told = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)[0, ids.shape[1] :]
        assert found[row] == tokenizer.decode(told, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "more", [{"num_return_sequences": 3}, {"return_dict_in_generate": True, "output_scores": True}]
)
def test_a_model_that_is_configured_to_give_more_than_an_answer_gives_one(ask, sampler, more):
    want, path = ask("a.csv", "--preset", "release", "--max_new_tokens", 9), sampler / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    assert len(want) == len(ask("b.csv", "--preset", "release", "--max_new_tokens", 9)) == len(QUESTIONS)


def test_the_base_answers_in_256_tokens_and_the_safe_model_in_512(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "soteria.answering.generation.generate_as_configured", lambda *_: iter([dict.fromkeys(range(3), "")])
    )
    for column in (SAFE_ANSWER, BASE_ANSWER):
        ask("a.csv", "--preset", "release", column=column)
    made = json.loads((tmp_path / "a.json").read_text())["columns"]
    assert [made[column]["max_new_tokens"] for column in (SAFE_ANSWER, BASE_ANSWER)] == [512, 256]
    grid = Grid.model_validate(GRID)
    assert [grid.longest(column) for column in (SAFE_ANSWER, BASE_ANSWER)] == [512, 256]


def test_an_interrupted_run_ends_with_the_same_answers_and_other_settings_are_asked_anew(ask, monkeypatch):
    words, add = ("--preset", "release", "--max_new_tokens", 9), Journal.add
    whole = ask("a.csv", *words)

    def interrupted(journal, rows):
        add(journal, rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", interrupted)
    ask("b.csv", *words, status=130)
    monkeypatch.setattr(Journal, "add", add)
    assert ask("b.csv", *words) == whole
    assert ask("b.csv", "--max_new_tokens", 9) == ask("greedy.csv", "--max_new_tokens", 9) != whole


def test_a_grid_asks_its_judges_as_the_release_did_unless_it_says_otherwise():
    asked = {"judges": ["refusal", "openai:a", "openai:b"], "judge_options": {"openai:b": {"preset": "soteria"}}}
    grid = Grid.model_validate(GRID | asked)
    presets = [grid.judge_option(judge).preset for judge in grid.judges]
    assert presets == [None, "release", "soteria"]
    with pytest.raises(ValueError, match="answer lengths of its own"):
        Grid.model_validate(GRID | {"answers": {"max_new_tokens": 9}})


def test_a_chat_template_is_refused_with_it(run_script, tmp_path):
    words = [
        "--model",
        "m",
        "--dataset",
        "d",
        "--language",
        "en",
        "--output",
        tmp_path / "a.csv",
        "--column",
        SAFE_ANSWER,
    ]
    assert run_script(script, *words, "--preset", "release", "--chat_template") == 2
