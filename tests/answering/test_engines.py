"""Answers from an engine: the same prompts and limits as our own decoding, what is refused, kills, facts."""

import json
import random
import shutil
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import run_in_child
from fake_endpoint import KEY
from served_models import serve, stand_in_for_vllm
from transformers import AutoTokenizer

import generate as script
from soteria.answering.generation import all_inputs, answer_questions
from soteria.languages import find_language
from soteria.models import endpoint as client
from soteria.models.loading import describe_model
from soteria.storage import paths
from soteria.storage.csv_files import read_table, write_table

ENGLISH = find_language("en")
QUESTIONS = ["yes?", "Is the big city old, or is the land new?", "no", "भारत", "hot or cold, small or big, old or new?"]
N_NEW = 6
CHAT = "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %} [assistant]"


@pytest.fixture
def arguments(tiny_folder, tmp_path):
    """`arguments(**options)`: the words of generate.py that ask QUESTIONS; options that are None are left out."""

    def words(questions=QUESTIONS, **options) -> list[str]:
        write_table(pd.DataFrame({"question": questions}), tmp_path / "asked.csv")
        options = {
            "model": tiny_folder("llama"),
            "dataset": tmp_path / "asked.csv",
            "language": "English",
            "output": tmp_path / "out" / "answers.csv",
            "column": "SAFE ANSWER",
            "max_new_tokens": N_NEW,
            "engine": "openai",
        } | options
        return [part for name, value in options.items() if value for part in (f"--{name}", str(value))]

    return words


@pytest.fixture
def ask(run_script, arguments):
    return lambda *flags, **options: run_script(script, *arguments(**options), *flags)


@pytest.fixture
def chat_folder(tiny_folder, tmp_path) -> Path:
    """The tiny model with a chat template."""
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def counter(model: Path, written: int = 3):
    """What a server counts: the tokens of a prompt as its own tokenizer makes them."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def usage(body: dict) -> dict:
        if "messages" in body:
            ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]
        else:
            ids = body["prompt"] if isinstance(body["prompt"], list) else tokenizer(body["prompt"]).input_ids
        return {"prompt_tokens": len(ids), "completion_tokens": written}

    return usage


def found(folder: Path, column: str = "SAFE ANSWER") -> list[str]:
    return list(read_table(folder / "out" / "answers.csv")[column])


def facts(folder: Path) -> dict:
    return json.loads((folder / "out" / "answers.json").read_text())["columns"]["SAFE ANSWER"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# A real server


def test_transformers_serve_gives_the_bytes_of_our_own_decoding(run_script, chat_folder, tmp_path, monkeypatch):
    """Completions of the embedded pair in two languages, and a chat with a tiny model."""
    base = paths.DATA / "models" / "polyglot-base"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve(tmp_path) as address:
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        for at, (model, language, chats) in enumerate(
            [(base, "Hindi", []), (base, "Tamil", []), (chat_folder, "English", ["--chat_template"])]
        ):
            asked = read_table(paths.DATA / "prompts" / f"policy_{language}.csv").iloc[::24]
            write_table(asked, tmp_path / "some.csv")
            shared = ["--model", model, "--dataset", tmp_path / "some.csv", "--language", language, *chats]
            shared += ["--column", "BASE ANSWER", "--max_new_tokens", 24, "--device", "cpu"]
            own, served = tmp_path / f"own {at}" / "a.csv", tmp_path / f"served {at}" / "a.csv"
            assert run_script(script, *shared, "--output", own) == 0
            assert run_script(script, *shared, "--output", served, "--engine", "openai", "--concurrency", 2) == 0
            assert served.read_bytes() == own.read_bytes()
            assert len(set(read_table(own)["BASE ANSWER"])) > 1


# What a server is sent, and what it may not do


def test_prompts_are_sent_as_token_ids_or_where_only_text_is_taken_as_text_of_so_many_tokens(
    endpoint, ask, tiny_folder, tmp_path
):
    described = describe_model(str(tiny_folder("llama")))
    ids = [str(each) for each in all_inputs(described, QUESTIONS, ENGLISH, False)]
    texts = [f"{ENGLISH.instruction}\nQ: {question}\nA:" for question in QUESTIONS]
    for takes_ids, sent in [(True, ids), (False, texts)]:

        def reply(prompt, n, takes_ids=takes_ids):
            return (200, f" to {prompt}") if takes_ids or not prompt.startswith("[") else (400, "a string, please")

        server = endpoint(reply, usage=counter(tiny_folder("llama")))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert ask(concurrency=1) == 0
        assert [prompt for prompt in server.asked if prompt in sent] == sent
        assert len(server.asked) == len(sent) + (not takes_ids)  # that ids are refused is found out once
        assert found(tmp_path) == [f"to {prompt}" for prompt in sent]
        (body, *_) = server.bodies.values()
        assert (body["temperature"], body["max_tokens"], body["model"]) == (0, N_NEW, str(tiny_folder("llama")))
        assert not {"stop_token_ids", "repetition_penalty"} & body.keys()
    host = server.address.partition("//")[2]
    assert facts(tmp_path)["served"] == {
        "engine": "openai", "model": str(tiny_folder("llama")), "host": host, "version": "1.2.3",
    }  # fmt: skip


def test_a_server_is_told_where_answers_end_and_of_no_penalty_where_its_configuration_says_otherwise(
    endpoint, ask, chat_folder, tmp_path
):
    config = json.loads((chat_folder / "generation_config.json").read_text())
    config |= {"repetition_penalty": 3.0, "eos_token_id": 5}
    (chat_folder / "generation_config.json").write_text(json.dumps(config))
    ends = sorted({5, AutoTokenizer.from_pretrained(chat_folder).eos_token_id})
    for refuses in (None, "repetition_penalty", "stop_token_ids"):
        server = endpoint(lambda prompt, n: (200, "a"), usage=counter(chat_folder), refuses=refuses)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert ask(model=chat_folder) == (2 if refuses == "stop_token_ids" else 0)
        body = list(server.bodies.values())[-1]
        assert (body["frequency_penalty"], body["stop_token_ids"]) == (0, ends)
        assert body.get("repetition_penalty") == (None if refuses == "repetition_penalty" else 1.0)


def test_another_tokenizer_a_shorter_context_and_an_unknown_end_are_refused_with_nothing_left(
    endpoint, ask, tiny_folder, tmp_path, capfd
):
    right = counter(tiny_folder("llama"))
    for usage, finish, named in [
        (lambda body: right(body) | {"prompt_tokens": right(body)["prompt_tokens"] + 1}, "stop", "for the server"),
        (lambda body: {}, "stop", "an unknown number"),
        (right, "length", "cut off at 3 tokens, not at 6"),
        (counter(tiny_folder("llama"), written=7), "stop", "cut off at 7 tokens"),
        (right, "abort", "5 × finish reason abort"),
        (right, "content_filter", "5 × content filter"),
    ]:
        endpoint(lambda prompt, n, finish=finish: (200, {"text": "a", "finish_reason": finish}), usage=usage)
        assert ask() == 2
        said = capfd.readouterr().err
        assert named in said and "Traceback" not in said and KEY not in said
        assert not contents(tmp_path / "out")


def test_a_question_without_an_answer_is_named_and_asked_again_by_the_same_command(
    endpoint, ask, tiny_folder, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(client, "MAX_RETRIES", 0)
    usage, lost = counter(tiny_folder("llama")), []

    def reply(prompt, n):
        lost.extend([prompt] if not lost else [])
        return (503, "") if prompt in lost else (200, f"to {prompt}")

    endpoint(reply, usage=usage)
    assert ask() == 2
    assert "1 questions got no answer (1 × status 503)" in capfd.readouterr().err
    assert not (tmp_path / "out" / "answers.csv").exists()
    server = endpoint(lambda prompt, n: (200, f"to {prompt}"), usage=usage)
    assert ask() == 0
    assert server.asked == lost and len(found(tmp_path)) == len(QUESTIONS)
    server.asked.clear()
    assert ask() == 0 and not server.asked
    assert ask(engine=None) == 0  # our own decoding's are other answers
    assert "engine" not in facts(tmp_path) and found(tmp_path)[0] != f"to {lost[0]}"


def test_no_text_is_a_blank_answer_and_half_a_character_is_none(endpoint, ask, tiny_folder, tmp_path, capfd):
    usage = counter(tiny_folder("llama"))
    endpoint(lambda prompt, n: (200, {"text": "\ud83d"}), usage=usage)
    assert ask() == 2
    said = capfd.readouterr().err
    assert "5 × half a character" in said and "Traceback" not in said and not contents(tmp_path / "out")
    endpoint(lambda prompt, n: (200, None), usage=usage)
    assert ask() == 0 and set(found(tmp_path)) == {""}


def test_what_a_server_calls_reasoning_is_the_answers_thinking(endpoint, ask, chat_folder, tmp_path, capfd):
    message = {"content": " Yes.", "reasoning_content": "Is it?"}
    server = endpoint(lambda prompt, n: (200, {"message": message}), usage=counter(chat_folder))
    assert ask("--chat_template", model=chat_folder) == 0
    assert set(found(tmp_path)) == {"Yes."} and set(found(tmp_path, "SAFE THINKING")) == {"Is it?"}
    assert f"{ENGLISH.instruction}\n\n{QUESTIONS[0]}" in server.asked
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    tokenizer.add_tokens(["[THINK]", "[/THINK]"], special_tokens=True)  # which servers leave out of texts
    tokenizer.save_pretrained(chat_folder)
    endpoint(lambda prompt, n: (200, "Is it? Yes."), usage=counter(chat_folder))
    for flags, named in [([], "ask it through its chat template"), (["--chat_template"], "reasoning parser")]:
        assert ask(*flags, model=chat_folder) == 2
        assert named in capfd.readouterr().err and set(found(tmp_path)) == {"Yes."}


def test_engines_that_cannot_be_used_are_refused_before_anything_is_done(endpoint, ask, tmp_path, monkeypatch, capfd):
    endpoint(lambda prompt, n: (404, ""))
    monkeypatch.setitem(sys.modules, "vllm", None)
    for options, flags, named in [
        ({"engine": "vllm"}, [], "vLLM is not installed"),
        ({"engine": "tgi"}, [], "unknown engine 'tgi'"),
        ({}, ["--preset", "release"], "engines answer greedily"),
        ({}, [], "status 404"),
        ({}, ["--chat_template"], "no chat template"),
    ]:
        assert ask(*flags, **options) == 2
        assert named in capfd.readouterr().err
    monkeypatch.delenv("OPENAI_API_KEY")
    assert ask() == 2 and "OPENAI_API_KEY" in capfd.readouterr().err
    assert not contents(tmp_path / "out")


def test_killed_five_times_nothing_that_was_answered_is_asked_twice_and_the_bytes_are_the_same(
    endpoint, arguments, run_script, tiny_folder, tmp_path
):
    usage, draw, n, at_once = counter(tiny_folder("llama")), random.Random(18), 120, 4
    questions = [f"Is {row} small or big?" for row in range(n)]

    def slowly(prompt, _):
        time.sleep(0.004)
        return 200, f"to {len(prompt)} of {prompt[-40:]}"

    server = endpoint(slowly, usage=usage)
    words = arguments(questions, concurrency=at_once)
    assert run_script(script, *words) == 0
    whole, calls = contents(tmp_path / "out"), set(server.asked)
    shutil.rmtree(tmp_path / "out")
    server.asked.clear()
    journal = paths.answer_journal(tmp_path / "out" / "answers.csv", "SAFE ANSWER")
    known = all_inputs(describe_model(str(tiny_folder("llama"))), questions, ENGLISH, False)
    answered: set[str] = set()
    for kill in range(6):
        before = len(server.asked)
        if kill < 5:
            enough = before + draw.randrange(at_once, n // 6)
            run_in_child(script, words, kill_when=lambda _: _until(lambda: len(server.asked) >= enough))  # noqa: B023
        else:
            assert run_script(script, *words) == 0
        assert not answered & set(server.asked[before:])
        if kill < 5:
            rows = [json.loads(line)[0] for line in journal.read_text().splitlines()[1:] if line.endswith("]")]
            answered |= {str(known[row]) for row in rows}
            assert 0 < len(answered) < n
    assert contents(tmp_path / "out") == whole
    assert set(server.asked) == calls and len(server.asked) <= n + 5 * (at_once + 1)


def _until(happened) -> None:
    while not happened():
        time.sleep(0.001)


# vLLM


def test_vllm_gets_token_ids_and_its_tokens_become_the_answers(ask, tiny_folder, tiny_loaded, tmp_path, monkeypatch):
    made = stand_in_for_vllm(monkeypatch)
    assert ask(engine="vllm") == 0
    assert found(tmp_path) == answer_questions(tiny_loaded("llama"), QUESTIONS, ENGLISH, max_new_tokens=N_NEW)
    assert facts(tmp_path)["served"] == {"engine": "vllm", "version": "9.9"}
    assert made == [{"model": str(tiny_folder("llama")), "dtype": "auto"}]
