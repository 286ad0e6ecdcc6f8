"""Greedy answers: what they depend on and what not, and the CSV that they land in."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import ROOT, run_in_child
from transformers import AutoTokenizer

import generate as script
from soteria.answering import generation
from soteria.answering.columns import AnswerColumn
from soteria.answering.generation import all_inputs, answer_questions, generate, model_inputs
from soteria.answering.questions import dataset_slug, question_prompt, read_questions
from soteria.errors import UserError
from soteria.languages import find_language
from soteria.models.loading import load_model
from soteria.storage import paths
from soteria.storage.csv_files import read_table, write_table
from soteria.storage.journal import Journal

ENGLISH = find_language("en")
QUESTIONS = ["yes?", "Is the big city old, or is the land new?", "no", "भारत", "hot or cold, small or big, old or new?"]
N_NEW = 12  # longer than the sliding windows of the tiny models
CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %} [assistant]"
ODD_TEXTS = [
    "NA",
    "null",
    "",
    "nan",
    "007",
    '"quoted", and more',
    "two\nlines",
    "a\r\nb",
    "a\rb",
    "👩‍👧 emoji",
    "مرحبا بالعالم",
    "a\u2028b\x00c",
    "\ufeffmark",
    "# comment",
]


class TokenIds:
    """A model's tokenizer that decodes tokens to their numbers, so that answers are compared token for token."""

    chat_template = None

    def __init__(self, tokenizer):
        self.tokenizer, self.pad_token_id, self.eos_token_id = tokenizer, tokenizer.pad_token_id, 0

    def __call__(self, text):
        return self.tokenizer(text)

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(str(token) for token in row if token != self.eos_token_id) for row in rows]


def by_number(loaded):
    return replace(loaded, tokenizer=TokenIds(loaded.tokenizer))


def answers(loaded, questions=QUESTIONS, batch_size=2, **options) -> list[str]:
    return answer_questions(loaded, questions, ENGLISH, batch_size=batch_size, max_new_tokens=N_NEW, **options)


@torch.no_grad()
def greedy_loop(loaded, ids: list[int], eos: int = 0) -> list[int]:
    """The oracle: the most probable next token, one full forward a token, no cache, no batch, no padding."""
    tokens: list[int] = []
    while len(tokens) < N_NEW:
        tokens.append(int(loaded.model(torch.tensor([ids + tokens])).logits[0, -1].argmax()))
        if tokens[-1] == eos:
            break
    return tokens


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral-sliding", "phi3", "gemma2", "gpt2", "gpt-neox"])
def test_a_padded_batch_gives_the_tokens_of_a_hand_written_argmax_loop(architecture, tiny_loaded):
    loaded = by_number(tiny_loaded(architecture))
    want = [greedy_loop(loaded, model_inputs(loaded, question, ENGLISH, False)) for question in QUESTIONS]
    got = answers(loaded, batch_size=len(QUESTIONS))
    assert got == [" ".join(str(token) for token in tokens if token) for tokens in want]
    assert len(set(got)) > 1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 99])
def test_an_answer_does_not_depend_on_the_batch_size(batch_size, tiny_loaded):
    loaded = by_number(tiny_loaded("llama"))
    assert answers(loaded, batch_size=batch_size) == [answers(loaded, [question])[0] for question in QUESTIONS]


def test_an_answer_does_not_depend_on_the_order_of_questions(tiny_loaded):
    loaded = by_number(tiny_loaded("llama"))
    assert answers(loaded, QUESTIONS[::-1]) == answers(loaded)[::-1]


def test_the_padding_token_changes_no_answer(tiny_loaded, monkeypatch):
    loaded = by_number(tiny_loaded("llama"))
    want = answers(loaded)
    monkeypatch.setattr(loaded.tokenizer, "pad_token_id", 300)
    assert [text.replace(" 300", "") for text in answers(loaded)] == [text.replace(" 300", "") for text in want]


def test_sampling_and_penalties_in_a_models_generation_config_do_not_count(tiny_folder, tiny_loaded, tmp_path):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.9, "repetition_penalty": 3.0}
    (folder / "generation_config.json").write_text(json.dumps(config))
    assert answers(by_number(load_model(str(folder), "cpu"))) == answers(by_number(tiny_loaded("llama")))


def test_an_answer_stops_at_the_end_of_text_token(tiny_loaded, monkeypatch):
    loaded = tiny_loaded("llama")
    tokens = greedy_loop(loaded, model_inputs(loaded, QUESTIONS[0], ENGLISH, False))
    last = next(at for at in range(2, N_NEW) if tokens[at] not in tokens[:at])
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", tokens[last])
    got = answers(by_number(loaded))[0]
    assert got == " ".join(map(str, tokens[: last + 1]))


def test_batches_that_are_done_are_left_out_and_the_others_are_the_same_batches(tiny_loaded):
    loaded = tiny_loaded("llama")
    inputs = all_inputs(loaded, QUESTIONS * 2, ENGLISH, False)
    every = list(generate(loaded, inputs, 2, N_NEW))
    assert len(every) > 2 and len(every[1]) > 1
    done = {*every[0], *every[2], next(iter(every[1]))}  # a batch that is done in part is computed whole
    assert list(generate(loaded, inputs, 2, N_NEW, done)) == [every[1], *every[3:]]


def test_without_chat_template_a_question_stands_between_its_marks(tiny_loaded):
    loaded = tiny_loaded("llama")
    text = loaded.tokenizer.decode(model_inputs(loaded, "hot?", ENGLISH, False))
    assert text == f"<s>{question_prompt('hot?', ENGLISH)}"
    assert text.endswith("\nQ: hot?\nA:")


@pytest.fixture
def chat_folder(tiny_folder, tmp_path) -> Path:
    """A tiny model whose tokenizer has a chat template."""
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "<s>" + CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_a_chat_template_is_used_when_asked_for_and_adds_the_only_bos(chat_folder):
    loaded = load_model(str(chat_folder), "cpu")
    text = loaded.tokenizer.decode(model_inputs(loaded, "hot?", ENGLISH, True))
    assert text == f"<s>[user] {ENGLISH.instruction}\n\nhot? [assistant]"


def test_a_chat_template_is_not_used_unasked(chat_folder):
    loaded = load_model(str(chat_folder), "cpu")
    assert "[user]" not in loaded.tokenizer.decode(model_inputs(loaded, "hot?", ENGLISH, False))


def test_a_model_without_chat_template_is_refused_when_one_is_asked_for(tiny_loaded):
    with pytest.raises(UserError, match="has no chat template"):
        answers(tiny_loaded("llama"), chat_template=True)


# The script


@pytest.fixture
def run_generate(run_script, tiny_folder, tmp_path):
    """`run_generate(**options)` runs generate.py on QUESTIONS and returns its status."""
    write_table(pd.DataFrame({"question": QUESTIONS}), tmp_path / "asked.csv")

    def run(column: str = "SAFE ANSWER", **options) -> int:
        options = {
            "model": tiny_folder("llama", seed=int(column == "SAFE ANSWER")),
            "dataset": tmp_path / "asked.csv",
            "language": "English",
            "output": tmp_path / "out" / "answers.csv",
            "batch_size": 2,
            "max_new_tokens": N_NEW,
            "device": "cpu",
        } | options
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return run_script(script, "--column", column, *flags)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def no_model(monkeypatch):
    """Fails a test that loads a model from here on."""

    def install():
        def refuse(*_):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr("soteria.models.loading.load_model", refuse)

    return install


def test_both_columns_land_in_one_file_whatever_the_order_of_calls(run_generate, tmp_path):
    written = []
    for name, columns in [("a", ("SAFE ANSWER", "BASE ANSWER")), ("b", ("BASE ANSWER", "SAFE ANSWER"))]:
        for column in columns:
            assert run_generate(column, output=tmp_path / name / "answers.csv") == 0
        written.append((tmp_path / name / "answers.csv").read_bytes())
    assert written[0] == written[1]
    table = read_table(tmp_path / "a" / "answers.csv")
    assert list(table.columns) == ["Question", "SAFE ANSWER", "BASE ANSWER"]
    assert list(table["Question"]) == QUESTIONS
    assert list(table["SAFE ANSWER"]) != list(table["BASE ANSWER"])


def test_the_file_holds_the_models_answers_in_the_questions_order(run_generate, tiny_loaded, tmp_path):
    assert run_generate("BASE ANSWER") == 0
    assert list(read_table(tmp_path / "out" / "answers.csv")["BASE ANSWER"]) == answers(tiny_loaded("llama", seed=0))


def test_a_complete_column_is_left_as_it_is(run_generate, tmp_path, no_model):
    assert run_generate() == 0
    before = contents(tmp_path / "out")
    no_model()
    assert run_generate() == 0
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("changed", [{"max_new_tokens": 3}, {"language": "German"}])
def test_a_column_made_with_other_settings_is_made_anew(changed, run_generate, tmp_path):
    assert run_generate() == 0
    before = contents(tmp_path / "out")["answers.csv"]
    assert run_generate(**changed) == 0
    assert contents(tmp_path / "out")["answers.csv"] != before


def test_an_interrupted_column_goes_on_and_ends_with_the_same_bytes(run_generate, tmp_path, monkeypatch):
    assert run_generate(output=tmp_path / "whole" / "answers.csv") == 0
    real, asked = generation.generate, []

    def stops(*arguments):
        yield next(real(*arguments))
        raise KeyboardInterrupt

    def counts(*arguments):
        for batch in real(*arguments):
            asked.extend(batch)
            yield batch

    monkeypatch.setattr(generation, "generate", stops)
    assert run_generate() == 130
    assert list(contents(tmp_path / "out")) == [".answers.csv.safe.journal"]
    monkeypatch.setattr(generation, "generate", counts)
    assert run_generate() == 0
    assert 0 < len(asked) < len(QUESTIONS)
    assert sorted(contents(tmp_path / "out")) == ["answers.csv", "answers.json"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_journal_cut_in_the_middle_of_a_line_loses_that_line_only(tmp_path):
    with Journal(tmp_path / "journal", {"a": 1}) as journal:
        journal.add(dict(enumerate(ODD_TEXTS)))
    text = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(text[:-4])
    with Journal(tmp_path / "journal", {"a": 1}) as again:
        assert again.done == dict(enumerate(ODD_TEXTS[:-1]))
        again.add({99: "more"})
    assert Journal(tmp_path / "journal", {"a": 1}).done == again.done


def test_a_journal_of_other_settings_counts_for_nothing(tmp_path):
    with Journal(tmp_path / "journal", {"a": 1}) as journal:
        journal.add({0: "old"})
    with Journal(tmp_path / "journal", {"a": 2}) as journal:
        assert journal.done == {}
        journal.add({1: "new"})
    assert Journal(tmp_path / "journal", {"a": 2}).done == {1: "new"}
    assert Journal(tmp_path / "journal", {"a": 1}).done == {}


def test_odd_texts_come_through_questions_answers_and_a_second_column_unchanged(run_generate, tmp_path, monkeypatch):
    questions = [f"{text}?" for text in ODD_TEXTS]
    write_table(pd.DataFrame({"question": questions}), tmp_path / "odd.csv")
    told = [dict(enumerate(ODD_TEXTS)), dict(enumerate(ODD_TEXTS[::-1]))]
    monkeypatch.setattr(generation, "generate", lambda *_: iter([told.pop(0)]))
    for column in ("SAFE ANSWER", "BASE ANSWER"):
        assert run_generate(column, dataset=tmp_path / "odd.csv") == 0
    table = read_table(tmp_path / "out" / "answers.csv")
    assert list(table["Question"]) == questions
    assert list(table["SAFE ANSWER"]) == ODD_TEXTS
    assert list(table["BASE ANSWER"]) == ODD_TEXTS[::-1]


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(run_generate, tmp_path):
    (tmp_path / "windows.csv").write_bytes("\r\n".join(["\ufeffquestion", *map('"{}"'.format, QUESTIONS), ""]).encode())
    assert run_generate() == 0
    assert run_generate(dataset=tmp_path / "windows.csv", output=tmp_path / "windows" / "answers.csv") == 0
    assert contents(tmp_path / "windows")["answers.csv"] == contents(tmp_path / "out")["answers.csv"]


@pytest.mark.parametrize("column", ["question", "Question", "prompt"])
def test_the_question_column_has_any_of_three_names(column, tmp_path):
    write_table(pd.DataFrame({"id": ["0"], column: ["hot?"]}), tmp_path / "asked.csv")
    assert read_questions(str(tmp_path / "asked.csv"), ENGLISH).questions == ["hot?"]


@pytest.mark.parametrize("name", ["asked_Hindi", "asked_Hindi.csv", "data/prompts/asked_Hindi.csv"])
def test_a_dataset_is_found_by_name_with_or_without_csv_and_by_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    (tmp_path / "data" / "prompts").mkdir(parents=True)
    write_table(pd.DataFrame({"question": ["hot?"]}), tmp_path / "data" / "prompts" / "asked_Hindi.csv")
    assert read_questions(name, ENGLISH).questions == ["hot?"]
    assert dataset_slug(name) == "asked_Hindi"


def test_the_facts_beside_the_answers_say_how_each_column_was_made(run_generate, tmp_path, tiny_folder):
    assert run_generate("BASE ANSWER") == 0
    facts = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert (facts["language"], facts["dataset"], facts["rows"]) == ("English", "asked", len(QUESTIONS))
    assert facts["columns"]["BASE ANSWER"]["model"] == str(tiny_folder("llama", seed=0))
    assert facts["columns"]["BASE ANSWER"]["max_new_tokens"] == N_NEW


# What runs share, what safety costs, processes and kills


def test_the_bases_answers_are_made_once_and_shared_by_every_scaling_factor(run_generate, tmp_path, no_model):
    out = tmp_path / "out"
    assert run_generate("BASE ANSWER", output=out / "scaling_1.csv", benign=tmp_path / "asked.csv") == 0
    no_model()
    for other in ("scaling_2.csv", "scaling_3.csv"):
        assert run_generate("BASE ANSWER", output=out / other, benign=tmp_path / "asked.csv") == 0
        assert (out / other).read_bytes() == (out / "scaling_1.csv").read_bytes()
        for end in ("csv", "base.first_token.safetensors"):
            made = [(out / "benign" / name).with_suffix(f".{end}").read_bytes() for name in (other, "scaling_1.csv")]
            assert made[0] == made[1]


@pytest.mark.parametrize(
    "changed", [{"max_new_tokens": 3}, {"language": "German"}, {"dataset": "other.csv"}, {"model": "another"}]
)
def test_the_bases_answers_are_not_shared_where_anything_differs(changed, run_generate, tmp_path, tiny_folder):
    write_table(pd.DataFrame({"question": QUESTIONS[::-1]}), tmp_path / "other.csv")
    if "dataset" in changed:
        changed = {"dataset": tmp_path / "other.csv"}
    if "model" in changed:
        changed = {"model": tiny_folder("llama", seed=7)}
    assert run_generate("BASE ANSWER", output=tmp_path / "out" / "a.csv") == 0
    assert run_generate("BASE ANSWER", output=tmp_path / "out" / "b.csv", **changed) == 0
    assert run_generate("BASE ANSWER", output=tmp_path / "fresh" / "b.csv", **changed) == 0
    assert (tmp_path / "out" / "b.csv").read_bytes() == (tmp_path / "fresh" / "b.csv").read_bytes()
    assert len(list((tmp_path / "out" / "base_answers").iterdir())) == 2


def test_another_model_in_the_same_folder_answers_anew(run_generate, tmp_path, tiny_folder):
    model = shutil.copytree(tiny_folder("llama", seed=0), tmp_path / "model")
    assert run_generate("BASE ANSWER", model=model) == 0
    before = contents(tmp_path / "out")["answers.csv"]
    shutil.copy(tiny_folder("llama", seed=1) / "model.safetensors", model / "model.safetensors")
    assert run_generate("BASE ANSWER", model=model) == 0
    assert contents(tmp_path / "out")["answers.csv"] != before


def test_another_model_in_the_same_folder_has_its_own_odds(run_generate, tmp_path, tiny_folder):
    model = shutil.copytree(tiny_folder("llama", seed=1), tmp_path / "model")
    odds = []
    for seed in (1, 2):
        shutil.copy(tiny_folder("llama", seed=seed) / "model.safetensors", model / "model.safetensors")
        assert run_generate(model=model, benign=tmp_path / "asked.csv") == 0
        beside = paths.first_token_file(paths.benign_file(tmp_path / "out" / "answers.csv"), "SAFE ANSWER")
        odds.append(beside.read_bytes())
    assert odds[0] != odds[1]


def test_harmless_questions_are_answered_beside_with_the_odds_of_their_first_tokens(
    run_generate, tmp_path, tiny_loaded
):
    assert run_generate(benign=tmp_path / "asked.csv") == 0
    beside = tmp_path / "out" / "benign" / "answers.csv"
    assert beside.read_bytes() == (tmp_path / "out" / "answers.csv").read_bytes()
    odds = safetensors.torch.load_file(paths.first_token_file(beside, "SAFE ANSWER"))["log_probs"]
    loaded = tiny_loaded("llama", seed=1)
    with torch.no_grad():
        want = [
            loaded.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            for ids in all_inputs(loaded, QUESTIONS, ENGLISH, False)
        ]
    torch.testing.assert_close(odds, torch.stack(want), atol=1e-4, rtol=1e-4)


def test_a_question_that_leaves_no_room_for_an_answer_is_refused_by_its_row(run_generate, tmp_path, capsys):
    write_table(pd.DataFrame({"question": ["hot?", "word " * 20_000]}), tmp_path / "long.csv")
    assert run_generate(dataset=tmp_path / "long.csv") == 2
    assert "row 1 is a question of" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.csv")) and not list((tmp_path / "out").rglob("*journal"))


def test_an_answer_ends_where_the_models_context_does(tiny_folder, tiny_loaded, tmp_path):
    loaded = load_model(str(tiny_folder("gpt2", n_positions=64)), "cpu")
    short, long = all_inputs(loaded, ["hot?", "hot? cold? big?"], ENGLISH, False)
    tokens = dict(pair for batch in generate(by_number(loaded), [short, long], 8, 500) for pair in batch.items())
    assert [len(ids) + len(tokens[row].split()) for row, ids in enumerate((short, long))] == [64, 64]


def command(folder: Path, model: Path, asked: Path, column: str) -> list[str]:
    words = ["--model", model, "--dataset", asked, "--benign", asked, "--language", "en", "--column", column]
    words += ["--output", folder / "answers.csv", "--batch_size", 1, "--max_new_tokens", 24, "--device", "cpu"]
    return list(map(str, words))


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def many_questions(tmp_path) -> Path:
    write_table(pd.DataFrame({"question": [f"{text} {n}" for n in range(4) for text in QUESTIONS]}), tmp_path / "q.csv")
    return tmp_path / "q.csv"


def test_the_journal_of_a_run_that_was_killed_at_its_very_end_goes_with_the_next(
    tiny_folder, many_questions, tmp_path, run_script, monkeypatch
):
    words = command(tmp_path / "out", tiny_folder("llama"), many_questions, "SAFE ANSWER")
    with monkeypatch.context() as killed:
        killed.setattr(AnswerColumn, "forget_journal", lambda _: None)
        assert run_script(script, *words) == 0
    left = [name for name in all_files(tmp_path / "out") if name.endswith(".journal")]
    assert len(left) == 2  # of the questions, and of the harmless ones
    assert run_script(script, *words) == 0
    assert not [name for name in all_files(tmp_path / "out") if name.endswith(".journal")]


@pytest.mark.parametrize("column", ["SAFE ANSWER", "BASE ANSWER"])
def test_killed_at_any_moment_and_resumed_the_bytes_are_the_same(column, tiny_folder, many_questions, tmp_path):
    model = tiny_folder("llama")
    run_in_child(script, command(tmp_path / "warm", model, many_questions, column))
    seconds = run_in_child(script, command(tmp_path / "whole", model, many_questions, column))
    expected = all_files(tmp_path / "whole")
    draw, stages = random.Random(column), []
    for index in range(15):
        out = tmp_path / str(index)
        run_in_child(script, command(out, model, many_questions, column), kill_after=draw.uniform(0.05, seconds))
        stages.append(tuple(sorted((name, len(text)) for name, text in all_files(out).items())) if out.exists() else ())
        run_in_child(script, command(out, model, many_questions, column))
        assert all_files(out) == expected
    assert len(set(stages)) >= 5  # the kills fell into different stages


def test_two_processes_write_the_same_file_as_one(tiny_folder, many_questions, tmp_path):
    model, environment = tiny_folder("llama"), {**os.environ, "OMP_NUM_THREADS": "1"}
    for out, start in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])):
        words = [sys.executable, *start, ROOT / "src" / "generate.py"]
        words += command(tmp_path / out, model, many_questions, "BASE ANSWER")
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert all_files(tmp_path / "two") == all_files(tmp_path / "one")


def test_two_runs_at_once_share_the_bases_answers(tiny_folder, many_questions, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, ROOT / "src" / "generate.py"]
    runs = []
    for name in ("scaling_1.csv", "scaling_2.csv"):
        more = [*command(tmp_path / "out", tiny_folder("llama"), many_questions, "BASE ANSWER"), "--output"]
        runs.append(subprocess.Popen([*words, *more, tmp_path / "out" / name], env=environment))
    assert [run.wait(120) for run in runs] == [0, 0]
    found = all_files(tmp_path / "out")
    assert found["scaling_1.csv"] == found["scaling_2.csv"]
    journal = next(text for name, text in found.items() if name.startswith("base_answers"))
    assert len(journal.splitlines()) == 1 + 20
