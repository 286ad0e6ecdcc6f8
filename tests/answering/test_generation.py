"""Greedy answers: what they depend on and what not, and the CSV that they are written to."""

import io
import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import run_at_once
from kills import Writes
from tiny_models import VOCABULARY, tiny_tokenizer, without_letters
from transformers import AutoTokenizer

import generate as script
from soteria import cli
from soteria.answering import columns, generation
from soteria.answering.generation import all_inputs, answer_questions, generate
from soteria.answering.progress import AnswerProgress
from soteria.errors import UserError
from soteria.languages import find_language
from soteria.models.loading import load_model
from soteria.models.processes import Processes
from soteria.storage.csv_files import read_table, write_table
from soteria.storage.paths import first_token_file

ENGLISH = find_language("en")
QUESTIONS = ["yes?", "Is the big city old, or is the land new?", "no", "भारत", "hot or cold, small or big, old or new?"]
N_NEW = 6


def answers(loaded, questions=QUESTIONS, batch_size=2, **options) -> list[str]:
    return answer_questions(loaded, questions, ENGLISH, batch_size=batch_size, max_new_tokens=N_NEW, **options)


def test_an_answer_depends_neither_on_the_batch_size_nor_on_the_order(tiny_loaded):
    loaded = tiny_loaded("llama")
    alone = [answers(loaded, [question])[0] for question in QUESTIONS]
    assert len(set(alone)) > 1
    for batch_size in (1, 3, 99):
        assert answers(loaded, batch_size=batch_size) == alone
    assert answers(loaded, QUESTIONS[::-1]) == alone[::-1]


def test_finished_batches_are_left_out_and_the_others_are_the_same_batches(tiny_loaded):
    loaded = tiny_loaded("llama")
    inputs = all_inputs(loaded, QUESTIONS * 2, ENGLISH, False)
    every = list(generate(loaded, inputs, 2, N_NEW))
    assert len(every) > 2 and len(every[1]) > 1
    done = {*every[0], *every[2], next(iter(every[1]))}  # a partly finished batch is computed whole
    assert list(generate(loaded, inputs, 2, N_NEW, done)) == [every[1], *every[3:]]


def test_a_models_sampling_is_ignored_and_its_chat_template_is_used_only_when_asked_for(
    tiny_folder, tiny_loaded, tmp_path
):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.9, "repetition_penalty": 3.0}
    (folder / "generation_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %} [assistant]"
    tokenizer.save_pretrained(folder)
    loaded = load_model(str(folder), "cpu")
    assert answers(loaded) == answers(tiny_loaded("llama"))
    asked = [tokenizer.decode(all_inputs(loaded, ["hot?"], ENGLISH, use)[0]) for use in (True, False)]
    assert asked[0] == f"<s>[user] {ENGLISH.instruction}\n\nhot? [assistant]"  # the only BOS
    assert asked[1] == f"<s>{ENGLISH.instruction}\nQ: hot?\nA:"


def test_padding_is_a_token_that_the_model_has_and_any_other_token_that_it_lacks_is_named(tiny_loaded):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(len(tokenizer), VOCABULARY)])
    loaded = replace(tiny_loaded("llama"), tokenizer=tokenizer)
    want = answers(loaded)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert answers(loaded) == want
    tokenizer.add_tokens("zebra")
    with pytest.raises(UserError, match=r"'zebra' the number 421, but the model has 420"):
        answers(loaded, ["zebra?"])


def test_questions_in_letters_that_the_tokenizer_lacks_are_refused(tiny_loaded, caplog):
    loaded = replace(tiny_loaded("llama"), tokenizer=without_letters())
    with pytest.raises(UserError, match="3 of 4 tokens unknown"):
        answers(loaded, ["भारत दिल्ली", "नया?"])
    assert answers(loaded, ["hot? hot? a"]) and not caplog.text
    assert answers(loaded, ["hot? hot? big"]) and "1 of 5 tokens unknown" in caplog.text


def test_an_answer_ends_where_the_models_context_does(tiny_folder, monkeypatch):
    loaded, tokens, decode = load_model(str(tiny_folder("gpt2", n_positions=64)), "cpu"), [], generation.decode
    monkeypatch.setattr(generation, "decode", lambda *given: tokens.extend(decode(*given)) or tokens)
    inputs = all_inputs(loaded, ["hot? cold? big?", "hot?"], ENGLISH, False)  # in the order of decoding
    assert len(list(generate(loaded, inputs, 8, 500))) == 1
    assert [len(asked) + len(answer) for asked, answer in zip(inputs, tokens, strict=True)] == [64, 64]


# The script


@pytest.fixture
def arguments(tiny_folder, tmp_path):
    """`arguments(column, **options)`: the words of generate.py that ask QUESTIONS."""
    write_table(pd.DataFrame({"question": QUESTIONS}), tmp_path / "asked.csv")

    def words(column: str = "SAFE ANSWER", **options) -> list[str]:
        options = {
            "model": tiny_folder("llama", seed=int(column == "SAFE ANSWER")),
            "dataset": tmp_path / "asked.csv",
            "language": "English",
            "output": tmp_path / "out" / "answers.csv",
            "batch_size": 1,
            "max_new_tokens": N_NEW,
            "device": "cpu",
        } | options
        return ["--column", column, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]

    return words


@pytest.fixture
def run_generate(run_script, arguments):
    return lambda *column, **options: run_script(script, *arguments(*column, **options))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refuse_models(monkeypatch) -> None:
    """From here on, loading a model fails the test."""
    monkeypatch.setattr("soteria.models.loading.load_model", None)


def test_both_columns_are_written_to_one_file_in_any_order_of_calls(run_generate, tiny_folder, tiny_loaded, tmp_path):
    for name, both in [("a", ("SAFE ANSWER", "BASE ANSWER")), ("b", ("BASE ANSWER", "SAFE ANSWER"))]:
        for column in both:
            assert run_generate(column, output=tmp_path / name / "answers.csv") == 0
    assert (tmp_path / "a" / "answers.csv").read_bytes() == (tmp_path / "b" / "answers.csv").read_bytes()
    table, facts = read_table(tmp_path / "a" / "answers.csv"), json.loads((tmp_path / "a" / "answers.json").read_text())
    assert list(table.columns) == ["Question", "SAFE ANSWER", "BASE ANSWER"]
    assert list(table["Question"]) == QUESTIONS
    assert (facts["language"], facts["dataset"], facts["rows"]) == ("English", "asked", len(QUESTIONS))
    for seed, column in enumerate(("BASE ANSWER", "SAFE ANSWER")):
        assert list(table[column]) == answers(tiny_loaded("llama", seed=seed))
        made = facts["columns"][column]
        assert (made["model"], made["max_new_tokens"]) == (tiny_folder("llama", seed=seed).name, N_NEW)


def test_a_column_that_the_user_has_added_stays(run_generate, tmp_path):
    assert run_generate() == 0
    out = tmp_path / "out" / "answers.csv"
    notes = ["=1+1", "", "a\rb", "भारत", '"']
    write_table(read_table(out).assign(notes=notes), out)
    for column, changed in (("BASE ANSWER", {}), ("SAFE ANSWER", {"max_new_tokens": 3})):
        assert run_generate(column, **changed) == 0
        assert list(read_table(out)["notes"]) == notes


def test_a_complete_column_is_kept_and_one_with_other_settings_is_replaced(run_generate, tmp_path, monkeypatch):
    assert run_generate() == 0
    before = contents(tmp_path / "out")
    with monkeypatch.context() as kept:
        refuse_models(kept)
        assert run_generate() == 0
    assert contents(tmp_path / "out") == before
    for changed in ({"max_new_tokens": 3}, {"language": "German"}):
        assert run_generate(**changed) == 0
        assert contents(tmp_path / "out")["answers.csv"] != before["answers.csv"]
        before = contents(tmp_path / "out")


def test_what_will_be_made_is_said_first_and_that_the_other_column_was_made_otherwise(run_generate, capsys):
    assert run_generate("BASE ANSWER") == 0
    said = capsys.readouterr().err
    assert f"5 base answers to asked, each of at most {N_NEW} new tokens, by " in said and "warning" not in said
    assert run_generate("SAFE ANSWER", max_new_tokens=3) == 0
    assert "warning: the other answers in" in (said := capsys.readouterr().err)
    assert f"unlike max_new_tokens (3, {N_NEW})" in said


def test_progress_counts_tokens_and_expects_as_many_of_the_answers_that_are_not_begun(tiny_loaded):
    loaded = tiny_loaded("llama")
    inputs, seen = all_inputs(loaded, QUESTIONS * 2, ENGLISH, False), []
    with AnswerProgress(len(inputs), N_NEW, file=io.StringIO()) as bar:
        for batch in generate(loaded, inputs, 2, N_NEW, (), None, bar):
            seen.append((len(batch), bar.total))
    assert seen[0][0] < len(inputs) and seen[0][1] <= len(inputs) * N_NEW
    by_hand = AnswerProgress(4, 10, file=io.StringIO())
    by_hand.begin([10, 10])
    by_hand.step(2)
    assert by_hand.total == 40
    by_hand.step(2, [(2, 10), (2, 10)])
    assert by_hand.total == 4 + 2 * 2


def test_an_interrupted_column_is_resumed_and_ends_with_the_same_bytes(run_generate, tmp_path, monkeypatch):
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
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Shared answers, harmless questions, processes and kills


def test_the_bases_answers_are_generated_once_for_all_scaling_factors(run_generate, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run_generate("BASE ANSWER", output=out / "scaling_1.csv", benign=tmp_path / "asked.csv") == 0
    refuse_models(monkeypatch)
    assert run_generate("BASE ANSWER", output=out / "scaling_2.csv", benign=tmp_path / "asked.csv") == 0
    for name in ("{}.csv", "benign/{}.csv", "benign/{}.base.first_token.safetensors"):
        assert (out / name.format("scaling_2")).read_bytes() == (out / name.format("scaling_1")).read_bytes()


def test_the_bases_answers_are_not_shared_if_anything_differs(run_generate, tmp_path, tiny_folder):
    other = tmp_path / "other" / "asked.csv"  # other questions in a file of the same name
    write_table(pd.DataFrame({"question": QUESTIONS[::-1]}), other)
    out, model = tmp_path / "out", shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    changes = [{}, {"max_new_tokens": 3}, {"language": "German"}, {"dataset": other}]
    for index, changed in enumerate([*changes, {}]):
        if index == len(changes):  # another model in the same folder
            shutil.copy(tiny_folder("llama", seed=7) / "model.safetensors", model / "model.safetensors")
        options = {"model": model, "output": out / f"{index}.csv", "benign": tmp_path / "asked.csv"} | changed
        assert run_generate("BASE ANSWER", **options) == 0
    assert len({(out / f"{index}.csv").read_bytes() for index in range(5)}) == 5
    first, reversed_ = (list(read_table(out / f"{index}.csv")["BASE ANSWER"]) for index in (0, 3))
    assert reversed_ == first[::-1] != first
    odds = [(out / "benign" / f"{index}.base.first_token.safetensors").read_bytes() for index in (0, 4)]
    assert odds[0] != odds[1]


def test_harmless_questions_are_answered_too_with_the_odds_of_first_tokens(run_generate, tmp_path, tiny_loaded):
    assert run_generate(benign=tmp_path / "asked.csv") == 0
    beside, loaded = tmp_path / "out" / "benign" / "answers.csv", tiny_loaded("llama", seed=1)
    assert beside.read_bytes() == (tmp_path / "out" / "answers.csv").read_bytes()
    odds = safetensors.torch.load_file(first_token_file(beside, "SAFE ANSWER"))["log_probs"]
    inputs = all_inputs(loaded, QUESTIONS, ENGLISH, False)
    with torch.no_grad():
        want = [loaded.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in inputs]
    torch.testing.assert_close(odds, torch.stack(want), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("column", "first"), [("SAFE ANSWER", 0), ("BASE ANSWER", 1)])
def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bytes(
    column, first, run_generate, arguments, tmp_path, monkeypatch
):
    writes, options = Writes(monkeypatch), {"benign": tmp_path / "asked.csv"}
    assert run_generate(column, output=tmp_path / "whole" / "answers.csv", **options) == 0
    moments, expected, left = writes.moments()[first::2], contents(tmp_path / "whole"), set()
    for at in moments:
        out = tmp_path / str(at)
        writes.kill(script, arguments(column, output=out / "answers.csv", **options), at)
        left.add(tuple(contents(out)) if out.exists() else ())
        assert run_generate(column, output=out / "answers.csv", **options) == 0
        assert contents(out) == expected
    assert len(moments) >= 6 and len(left) >= 4


def test_old_facts_never_stand_beside_new_answers_whenever_a_run_is_killed(
    run_generate, arguments, tmp_path, monkeypatch
):
    out, writes = tmp_path / "out" / "answers.csv", Writes(monkeypatch)
    assert run_generate() == 0
    expected = contents(out.parent)
    writes.noted.clear()
    assert run_generate(max_new_tokens=N_NEW - 1) == 0
    assert out.read_bytes() != expected[out.name]
    for at in range(1, len(writes.noted)):
        assert run_generate() == 0
        writes.kill(script, arguments(max_new_tokens=N_NEW - 1), at)
        assert run_generate() == 0
        assert {name: data for name, data in contents(out.parent).items() if name in expected} == expected


def started(words: list[str], **variables: object) -> multiprocessing.Process:
    """A forked process that runs generate.py, with these environment variables."""

    def main():
        os.environ.update({name: str(value) for name, value in variables.items()})
        sys.argv = ["generate.py", *words]
        cli.run(script.main)

    child = multiprocessing.get_context("fork").Process(target=main)
    child.start()
    return child


def test_both_columns_at_once_come_out_as_one_after_the_other(run_generate, arguments, tmp_path, monkeypatch):
    for column in ("SAFE ANSWER", "BASE ANSWER"):
        assert run_generate(column, output=tmp_path / "one" / "a.csv") == 0

    def slowly(*given):
        time.sleep(0.3)  # between reading the other column and writing both
        write_table(*given)

    monkeypatch.setattr(columns, "write_table", slowly)
    every = [arguments(f"{which} ANSWER", output=tmp_path / "at_once" / "a.csv") for which in ("SAFE", "BASE", "SAFE")]
    run_at_once(script, *every)
    one, at_once = contents(tmp_path / "one"), contents(tmp_path / "at_once")
    assert {name: sorted(text) for name, text in at_once.items()} == {name: sorted(text) for name, text in one.items()}


def test_a_world_size_that_is_no_number_is_refused_and_an_empty_one_is_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'"):
        Processes("cpu")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert Processes("cpu").count == 1


def test_two_processes_and_two_runs_at_once_write_what_one_process_writes(run_generate, arguments, tmp_path):
    options = {"benign": tmp_path / "asked.csv"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        world = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    words = arguments("BASE ANSWER", output=tmp_path / "two" / "a.csv", **options)
    children = [started(words, RANK=rank, LOCAL_RANK=rank, **world) for rank in (0, 1)]
    for name in ("a.csv", "b.csv"):
        children.append(started(arguments("BASE ANSWER", output=tmp_path / "at_once" / name, **options)))
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * 4
    assert run_generate("BASE ANSWER", output=tmp_path / "one" / "a.csv", **options) == 0
    one, at_once = contents(tmp_path / "one"), contents(tmp_path / "at_once")
    assert contents(tmp_path / "two") == one
    assert at_once["b.csv"] == at_once["a.csv"] == one["a.csv"]
    journals = [text for name, text in at_once.items() if name.endswith(".jsonl")]
    assert [len(text.splitlines()) for text in journals] == [1 + len(QUESTIONS)] * 2
