"""A judge behind an endpoint: what it is asked, what its faults do, what is kept, and that nothing shows the key."""

import asyncio
import json
import logging
import random
import re
import shutil
import threading
import time
import tracemalloc

import pandas as pd
import pytest
from conftest import run_at_once, run_in_child
from fake_endpoint import DROPPED, KEY, TRUNCATED
from kills import Writes

import judge as script
from soteria.errors import UserError
from soteria.judging.interface import EMPTY, FAILED, FILTERED, HARMFUL, JUDGE_PROMPT, NOT_HARMFUL, fill_prompt
from soteria.judging.judges import make_judge
from soteria.judging.presets import PRESETS, JudgeSettings
from soteria.judging.verdicts import AnswerFile, judge_answers
from soteria.models import endpoint as client
from soteria.storage.csv_files import read_table, write_rows, write_table

NAME = "openai:some-model"


def by_answer(prompt: str, n: int) -> tuple[int, str]:
    return 200, "Harmful" if "Sure" in prompt else "Not Harmful"


@pytest.fixture
def endpoint(endpoint):
    return lambda reply=by_answer, **options: endpoint(reply, **options)


def verdicts(answers: list[str], reason: bool = False, **options) -> list[str]:
    judge = make_judge(NAME, **options)
    found = dict(judge.judge((row, "Why?", answer) for row, answer in enumerate(answers)))
    return [
        found[row] if reason else found[row].replace(FAILED, EMPTY).partition(":")[0] for row in range(len(answers))
    ]


# What it is asked, and what its faults do


def test_labels_go_to_their_rows_and_blank_answers_are_not_asked(endpoint):
    server = endpoint()
    assert verdicts([*answers(20), " ", ""]) == [*right(20), EMPTY, EMPTY]
    assert sorted(server.asked) == sorted(fill_prompt(JUDGE_PROMPT, "Why?", answer) for answer in answers(20))
    assert server.keys == {f"Bearer {KEY}"}


def test_azures_variables_lead_to_azure(endpoint, monkeypatch):
    server = endpoint()
    for name, value in {"ENDPOINT": server.address, "API_KEY": KEY}.items():
        monkeypatch.setenv(f"AZURE_OPENAI_{name}", value)
    monkeypatch.setenv("OPENAI_API_VERSION", "2025-01-01")
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")
    assert verdicts(["Sure", "No"]) == [HARMFUL, NOT_HARMFUL]
    assert server.keys == {KEY}
    monkeypatch.delenv("AZURE_OPENAI_API_KEY")
    monkeypatch.setenv("AZURE_OPENAI_AD_TOKEN", f"{KEY}-token")
    assert verdicts(["Sure", "No"]) == [HARMFUL, NOT_HARMFUL]
    assert server.keys == {KEY, f"Bearer {KEY}-token"}


def test_calls_at_once_are_limited_and_rows_are_read_as_they_are_needed_even_where_a_loop_runs(endpoint):
    taken = 0

    def slowly(prompt, n):
        time.sleep(0.005)
        return by_answer(prompt, n)

    def rows():
        nonlocal taken
        for row in range(60):
            taken += 1
            yield row, "Why?", f"Sure {row}"

    async def notebook_cell():
        for at, _ in enumerate(make_judge(NAME, concurrency=4).judge(rows())):
            assert taken <= at + 4

    server = endpoint(slowly)
    asyncio.run(notebook_cell())
    assert taken == 60 and 2 <= server.most_at_once <= 4


def test_a_model_that_refuses_a_temperature_is_asked_without(endpoint):
    by_name = {"message": "temperature=0 is not taken", "param": None, "code": "400"}
    for refusal in (None, by_name):
        endpoint(refuses="temperature", refusal=refusal)
        assert verdicts(["Sure 1", "Sure 2", "No 3"], concurrency=3) == [HARMFUL, HARMFUL, NOT_HARMFUL]


def test_a_reasoning_model_gets_its_own_limit_no_temperature_and_only_its_reply_is_read(endpoint):
    """`reasoning_content` weighs both labels, and `content` may be null, a list of parts, or a refusal to judge."""
    message = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
    by_name = {"message": "Unsupported value: 'temperature' does not support 0", "param": "temperature", "code": "x"}
    settings = JudgeSettings(max_tokens=200)

    def told(text=None, finish="stop", **more):
        return 200, {"finish_reason": finish, "message": {"content": text} | more}

    for reply, found in [
        (told("Not Harmful", reasoning_content="Harmful? It lists steps. Harmful"), NOT_HARMFUL),
        (told("Harmful", reasoning="Not Harmful"), HARMFUL),
        (told(None, reasoning_content="Harmful"), "EMPTY: thinking without a reply"),
        (told(None, "length", reasoning_content="Harmful"), "EMPTY: cut off"),
        (told("<think>Harmful\nHarmful", "length"), "EMPTY: cut off"),
        (told(None, refusal="I cannot assist."), "EMPTY: the judge declined"),
        (told([{"type": "thinking", "thinking": []}, {"type": "text", "text": "Not Harmful"}]), NOT_HARMFUL),
        (told([{"type": "thinking", "thinking": "Harmful"}]), "EMPTY: neither label"),
        (told("Harmful", "content_filter"), "EMPTY: content filter"),  # cut off by the filter
    ]:
        endpoint(lambda prompt, n, reply=reply: reply)
        assert verdicts(["Sure"], reason=True) == [found], reply

    def reasons(prompt, n):
        body = server.bodies[prompt]
        if "temperature" in body:
            return 400, by_name
        return (400, {"message": message, "param": "max_tokens"}) if "max_tokens" in body else by_answer(prompt, n)

    server = endpoint(reasons)
    assert verdicts(["Sure 1", "No 2", "Sure 3"], settings=settings) == [HARMFUL, NOT_HARMFUL, HARMFUL]
    for body in server.bodies.values():
        assert body["max_completion_tokens"] == 200 and not {"temperature", "max_tokens"} & body.keys()


def test_the_settings_are_what_an_endpoint_is_sent(endpoint):
    server = endpoint()
    assert verdicts(["Sure"], settings=PRESETS["release"]) == [HARMFUL]
    (body,) = server.bodies.values()
    assert [each["role"] for each in body["messages"]] == ["system", "user"] and "Why?" not in str(body["messages"])
    assert body["max_tokens"] == 20 and "temperature" not in body
    server = endpoint(lambda prompt, n: (200, "unsafe\nS2" if "Sure" in prompt else "safe"))
    assert verdicts(["Sure", "No"], settings=JudgeSettings("llama_guard")) == [HARMFUL, NOT_HARMFUL]
    body = server.bodies["Why?\nSure"]
    assert [each["role"] for each in body["messages"]] == ["user", "assistant"] and body["temperature"] == 0
    with pytest.raises(UserError, match="hf:"):
        make_judge(NAME, JudgeSettings("shieldgemma"))


def test_what_a_filter_blocks_and_what_a_proxy_forbids_is_that_rows_reason(endpoint):
    blocked = {"code": "content_filter", "param": "prompt"}
    cut = {"finish_reason": "length", "message": {"content": "<think>Is it"}}
    for told, why in [
        ((400, blocked), "content filter"),
        ((400, {"innererror": {"code": "ResponsibleAIPolicyViolation"}}), "content filter"),
        ((200, {"finish_reason": "content_filter", "message": {}}), "content filter"),
        ((200, {"finish_reason": "content_filter: PROHIBITED_CONTENT"}), "content filter"),
        ((200, {"finish_reason": "SAFETY", "message": {"content": "Harmful"}}), "content filter"),
        ((200, {"finish_reason": "sensitive", "message": {"content": ""}}), "content filter"),
        ((400, {"code": "content_policy_violation"}), "content filter"),
        ((400, {"code": "moderation_blocked"}), "content filter"),
        ((400, {"code": "data_inspection_failed"}), "content filter"),
        ((400, {"message": "Content Exists Risk", "code": "invalid_request_error"}), "content filter"),
        ((403, {"code": 403, "metadata": {"reasons": ["x"], "flagged_input": "…"}}), "content filter"),
        ((200, cut), "cut off"),
        ((403, {"code": 403}), "status 403"),
        ((413, ""), "status 413"),
        ((200, "Hm."), "neither label"),
    ]:
        endpoint(lambda prompt, n, told=told: told if "bad" in prompt else by_answer(prompt, n))
        assert verdicts(["bad", "Sure", "bad", ""], reason=True) == [
            f"EMPTY: {why}",
            HARMFUL,
            f"EMPTY: {why}",
            "EMPTY: blank answer",
        ]


def test_rows_that_are_all_forbidden_do_not_look_like_a_bad_key(endpoint):
    """Such as the last rows of a run that was killed."""
    endpoint(lambda prompt, n: (403, "") if "bad" in prompt else by_answer(prompt, n))
    assert verdicts(["bad 1", "bad 2"], reason=True) == ["EMPTY: status 403"] * 2
    assert verdicts(["Sure", *["bad"] * 40], reason=True) == [HARMFUL, *["EMPTY: status 403"] * 40]


def test_variables_that_lead_nowhere_are_refused_at_once_in_a_sentence(endpoint, monkeypatch):
    azure = {"AZURE_OPENAI_ENDPOINT": "https://a.example", "AZURE_OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": ""}
    for variables, named in [
        ({"OPENAI_BASE_URL": "127.0.0.1:8000/v1"}, "OPENAI_BASE_URL"),
        ({"OPENAI_BASE_URL": "localhost:8000/v1"}, "http://"),
        ({"OPENAI_BASE_URL": "http://localhost:8000/v1\n"}, "OPENAI_BASE_URL is not an address"),
        ({"OPENAI_API_KEY": ""}, "OPENAI_API_KEY"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:99999/v1"}, "OPENAI_BASE_URL is not an address"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:port/v1"}, "OPENAI_BASE_URL is not an address"),
        ({"OPENAI_BASE_URL": "http://[::1/v1"}, "OPENAI_BASE_URL is not an address"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:8000\\v1"}, "OPENAI_BASE_URL is not an address"),
        ({"OPENAI_BASE_URL": f"http://a.example/{'v' * 100_000}"}, "OPENAI_BASE_URL is not an address"),
        ({"OPENAI_ORG_ID": "org\nanization"}, "OPENAI_ORG_ID"),
        ({"OPENAI_PROJECT_ID": "\u00e4"}, "OPENAI_PROJECT_ID"),
        ({"SSL_CERT_FILE": "/none.pem"}, "SSL_CERT_FILE"),
        ({"HTTP_PROXY": "http://127.0.0.1:99999"}, "HTTP_PROXY is not an address"),
        ({"HTTPS_PROXY": "http://a\n"}, "HTTPS_PROXY is not an address"),
        ({"ALL_PROXY": "http://[::1"}, "ALL_PROXY is not an address"),
        ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "proxy"),
        (azure, "OPENAI_API_VERSION"),
        (azure | {"AZURE_OPENAI_ENDPOINT": "a.example", "OPENAI_API_VERSION": "2025-01-01"}, "AZURE_OPENAI_ENDPOINT"),
        (azure | {"AZURE_OPENAI_API_KEY": "", "OPENAI_API_KEY": ""}, "AZURE_OPENAI_AD_TOKEN"),
    ]:
        with monkeypatch.context() as patch:
            endpoint()
            for name, value in variables.items():
                patch.setenv(name, value) if value else patch.delenv(name, raising=False)
            with pytest.raises(UserError, match=named) as caught:
                make_judge(NAME)
            assert KEY not in str(caught.value)
    endpoint()
    with pytest.raises(UserError, match="not UTF-8 text"):
        make_judge(f"{NAME}\udcff")


def test_a_nonsense_reply_is_asked_once_more_and_then_is_no_verdict(endpoint):
    for text in ["Hm.", "", None, "Harmful or Not Harmful"]:
        server = endpoint(lambda prompt, n, text=text: (200, text if n == 1 or "bad" in prompt else "Harmful"))
        assert verdicts(["Sure", "bad"]) == [HARMFUL, EMPTY]
        assert len(server.asked) == 4


def test_a_passing_fault_is_asked_again_and_one_that_stays_is_no_verdict(endpoint, monkeypatch, caplog):
    monkeypatch.setattr(client, "MAX_RETRIES", 2)
    for fault in [(429, ""), (500, ""), (503, ""), (408, ""), DROPPED, TRUNCATED]:
        server = endpoint(lambda prompt, n, fault=fault: fault if "bad" in prompt or n < 3 else by_answer(prompt, n))
        caplog.clear()
        assert verdicts(["Sure", "bad", "No"]) == [HARMFUL, EMPTY, NOT_HARMFUL], fault
        assert len(server.asked) == 6 + (4 if fault == TRUNCATED else 3), fault
        assert "1 rows without a verdict" in caplog.text
    for status in (400, 422):  # what the endpoint refuses to read is not asked again
        server = endpoint(lambda prompt, n, status=status: (status, "") if "bad" in prompt else by_answer(prompt, n))
        assert verdicts(["bad", "Sure"]) == [EMPTY, HARMFUL]
        assert len(server.asked) == 2


def test_the_time_that_an_endpoint_asks_for_is_waited(endpoint):
    times = []

    def reply(prompt, n):
        times.append(time.monotonic())
        return (429, "") if n == 1 else (200, "Harmful")

    endpoint(reply, retry_after_ms=1300)  # longer than the client would wait by itself
    verdicts(["Sure"])
    assert times[1] - times[0] >= 1.3


def test_neither_a_reply_that_takes_too_long_nor_an_interruption_holds_up_a_run(endpoint, monkeypatch):
    monkeypatch.setattr(client, "MAX_RETRIES", 0)
    release, started = threading.Event(), time.monotonic()
    server = endpoint(lambda prompt, n: (200, "Harmful") if "slow" not in prompt or release.wait(20) else None)
    assert verdicts(["slow", "Sure"], time_limit=1) == [EMPTY, HARMFUL]
    server.asked.clear()
    with pytest.raises(KeyboardInterrupt):
        for _ in make_judge(NAME, concurrency=2).judge((row, "Why?", "slow" if row else "go") for row in range(50)):
            raise KeyboardInterrupt
    assert time.monotonic() - started < 15
    release.set()
    assert len(server.asked) <= 3


def stream(*chunks: dict | str) -> bytes:
    """An event stream, whatever was asked for."""
    return "".join(
        f": wait\n\ndata: {each if isinstance(each, str) else json.dumps(each)}\n\n" for each in chunks
    ).encode()


def piece(text: str | None, finish: str | None = None, index: int = 0, **delta: str) -> dict:
    return {"choices": [{"index": index, "delta": {"content": text} | delta, "finish_reason": finish}]}


def whole(*texts: object, **more: object) -> bytes:
    choices = [{"index": at, "finish_reason": "stop", "message": {"content": text}} for at, text in enumerate(texts)]
    return json.dumps({"choices": choices} | more).encode()


BLOCKED = {"promptFeedback": {"blockReason": "SAFETY"}}
AS_REPORTED = {
    "a choice that broke off": (
        b'{"choices": [{"finish_reason": "error", "message": {"content": "Harmful"}}]}',
        "FAILED: broken reply",
    ),
    "two choices": (whole("Harmful", "Not Harmful"), HARMFUL),
    "a list of parts": (whole([{"type": "text", "text": "Not Harmful"}]), NOT_HARMFUL),
    "a list of texts": (whole(["Not Harmful"]), NOT_HARMFUL),
    "no choice": (whole(), "EMPTY: no choice in the reply"),
    "null for choices": (b'{"choices": null}', "EMPTY: no choice in the reply"),
    "no choice, by a filter": (whole(**BLOCKED), "EMPTY: content filter"),
    "no choice, by Azure's filter": (
        whole(prompt_filter_results=[{"content_filter_results": {"hate": {"filtered": True}}}]),
        "EMPTY: content filter",
    ),
    "no choice, let through by Azure's filter": (
        whole(prompt_filter_results=[{"content_filter_results": {"hate": {"filtered": False}}}]),
        "EMPTY: no choice in the reply",
    ),
    "a filter's error with status 200": (b'{"error": {"code": "content_filter"}}', "EMPTY: content filter"),
    "an error with status 200": (b'{"error": {"message": "overloaded", "code": 502}}', "FAILED: broken reply"),
    "HTML": (b"<!DOCTYPE html><title>Sign in</title>Harmful", "FAILED: broken reply"),
    "JSON as text": (whole("Harmful"), HARMFUL),
    "nothing": (b"", "FAILED: broken reply"),
    "a reply of 17 MB": (whole("Harmful" + " " * 17_000_000), "FAILED: broken reply"),
    "a byte-order mark": ("\ufeff".encode() + whole("Harmful"), HARMFUL),
    "deep JSON": (b"[" * 100_000, "FAILED: broken reply"),
    "a stream": (stream(piece("Not", role="assistant"), piece(" Harmful"), piece("", "stop"), "[DONE]"), NOT_HARMFUL),
    "a stream of thoughts": (
        stream(piece(None, reasoning_content="Harmful"), piece("Not Harmful", "stop")),
        NOT_HARMFUL,
    ),
    "a stream of two choices": (stream(piece("Harmful"), piece("Not ", index=1), "[DONE]"), HARMFUL),
    "a stream without an end": (stream(piece("Harmful")), "FAILED: broken reply"),
    "a stream that a filter ends": (stream(piece("Harmful"), piece("", "content_filter")), "EMPTY: content filter"),
    "a stream of no error": (stream({"error": None} | piece("Harmful", "stop"), "[DONE]"), HARMFUL),
    "a stream of a whole message": (
        stream({"choices": [{"finish_reason": "stop", "message": {"content": "Harmful"}}]}),
        HARMFUL,
    ),
    "a stream of an error": (stream({"error": {"code": 500}}), "FAILED: broken reply"),
}


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/json"])
def test_a_reply_of_another_form_is_read_or_is_no_verdict(endpoint, monkeypatch, kind):
    monkeypatch.setattr(client, "BROKEN_REPLIES", 2)
    cases = {f"<{name}>": sent for name, (sent, _) in AS_REPORTED.items()}
    server = endpoint(
        lambda prompt, n: next(((200, sent) for case, sent in cases.items() if case in prompt), (200, "Harmful")),
        headers={"Content-Type": kind},
    )
    found = verdicts([*cases, "Sure"], reason=True)
    assert dict(zip(cases, found, strict=False)) == {f"<{name}>": right for name, (_, right) in AS_REPORTED.items()}
    assert found[-1] == HARMFUL and len(server.asked) <= 2 * len(found)


@pytest.mark.parametrize(
    "status, headers, told, named",
    [
        (429, {"Retry-After": "7200"}, "", "status 429; its reply says 'Retry-After: 7200'"),
        (503, {"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}, "", "Retry-After: Fri, 31 Dec 2100 23:59:59 GMT"),
        (429, {"Retry-After": "0"}, {"code": "insufficient_quota"}, "check its key, its address .* its quota"),
        (401, {}, "", "what it gave so far is kept"),
        (404, {}, {"code": "model_not_found"}, "status 404; check .* ends in /v1.* the model's name"),
        (405, {}, "", "status 405; check"),
        (302, {"Location": "/v1/models"}, "", "status 302, a redirect, which is not followed; check its key"),
        (308, {}, "", "status 308, a redirect"),
        (200, {"Content-Type": "text/html"}, b"<html>Sign in", "broken reply; its address mostly ends in /v1"),
    ],
)
def test_an_endpoint_that_stops_midway_ends_the_run_soon_and_in_a_sentence(
    endpoint, evaluate, tmp_path, monkeypatch, capfd, status, headers, told, named
):
    monkeypatch.setattr(client, "MAX_RETRIES", 1)
    monkeypatch.setattr(client, "BROKEN_REPLIES", 1)
    monkeypatch.setattr(client, "LEAST_FAILURES", 4)
    server = endpoint(
        lambda prompt, n: by_answer(prompt, n) if len(server.asked) <= 10 else (status, told),
        retry_after_ms=None,
        headers=headers,
    )
    assert evaluate(30, "--concurrency", "1") == 2
    said = capfd.readouterr().err
    assert re.search(named, said) and "Traceback" not in said and KEY not in said
    assert len(server.asked) <= 10 + 2 * 4
    again = endpoint()
    assert evaluate(30) == 0 and judged(tmp_path) == right(30) and len(again.asked) <= 20


@pytest.mark.parametrize("date", ["Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-5", "nan"])
def test_a_time_to_wait_that_is_past_or_no_time_holds_nothing_up(endpoint, monkeypatch, date):
    monkeypatch.setattr(client, "MAX_RETRIES", 1)
    server = endpoint(lambda prompt, n: (429, "") if n == 1 else by_answer(prompt, n), headers={"Retry-After": date})
    server.retry_after_ms = None
    assert verdicts(["Sure"]) == [HARMFUL]


def test_a_proxy_is_asked_and_one_that_is_not_there_is_named(endpoint, monkeypatch):
    server = endpoint()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://judge.invalid/v1/")
    monkeypatch.setenv("HTTP_PROXY", server.address)
    assert verdicts(["Sure", "No"]) == [HARMFUL, NOT_HARMFUL]
    monkeypatch.setattr(client, "MAX_RETRIES", 0)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="no connection; check its address and the proxy variables"):
        verdicts(["Sure"])


def test_an_address_where_nobody_listens_is_named_after_one_row(endpoint, monkeypatch):
    """With one call at once, 32 rows with all their retries would be eleven minutes without a word."""
    endpoint()
    monkeypatch.setattr(client, "MAX_RETRIES", 1)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    started, rows = time.monotonic(), ((row, "Why?", "Sure") for row in range(40))
    with pytest.raises(UserError, match="failed from the start, with 'All connection attempts failed'"):
        dict(make_judge(NAME, concurrency=1).judge(rows))
    assert time.monotonic() - started < 10 and next(rows)[0] <= 2


# judge.py


def answers(n_rows: int) -> list[str]:
    return [f"Sure {row}" if row % 3 else f"No {row}" for row in range(n_rows)]


def right(n_rows: int) -> list[str]:
    return [HARMFUL if row % 3 else NOT_HARMFUL for row in range(n_rows)]


def words(folder, output: str = "Evaluated.csv", concurrency: int = 16, **columns: list[str]) -> list[str]:
    """The words that judge a file with these answer columns, which is written here."""
    table = {"Question": [f"Question {row}?" for row in range(len(columns["SAFE"]))]}
    write_table(pd.DataFrame(table | {f"{name} ANSWER": texts for name, texts in columns.items()}), folder / "a.csv")
    found = ["--input", folder / "a.csv", "--output", folder / "out" / output, "--judge", NAME]
    return list(map(str, [*found, "--concurrency", concurrency]))


@pytest.fixture
def evaluate(run_script, tmp_path):
    """`evaluate(n rows)` judges so many answers, every third of which declines, and gives the status."""
    return lambda n_rows, *options: run_script(script, *words(tmp_path, SAFE=answers(n_rows)), *options)


def judged(folder, column: str = "Verdict_Safe") -> list[str]:
    return list(read_table(folder / "out" / "Evaluated.csv")[column])


def test_a_faulty_endpoint_and_a_kill_half_way_give_no_wrong_verdict(endpoint, evaluate, tmp_path):
    """8 % status 429, 6 % status 500, 3 % dropped connections, 3 % truncated JSON, 4 % nonsense."""
    n_rows, draw, lock = 250, random.Random(0), threading.Lock()
    nonsense = ["Hm.", "Harmful or Not Harmful?", "{}", "", "I cannot say whether it is harmful.", "Not sure."]

    def faulty(prompt, n):
        with lock:
            at, words = draw.random(), draw.choice(nonsense)
        for share, fault in ((0.08, (429, "")), (0.06, (500, "")), (0.03, DROPPED), (0.03, TRUNCATED)):
            if at < share:
                return fault
            at -= share
        return (200, words) if at < 0.04 else by_answer(prompt, n)

    def kill_half_way(process):
        while len(server.asked) < n_rows * 0.6 and process.is_alive():
            time.sleep(0.001)

    server = endpoint(faulty)
    run_in_child(script, words(tmp_path, SAFE=answers(n_rows)), kill_when=kill_half_way)
    journal = tmp_path / "out" / ".Evaluated.csv.journal"
    assert n_rows * 0.2 < len(journal.read_text().splitlines()) < n_rows
    assert evaluate(n_rows) == 0
    assert not [pair for pair in zip(judged(tmp_path), right(n_rows), strict=True) if pair[0] not in (pair[1], EMPTY)]
    assert judged(tmp_path).count(EMPTY) <= 0.01 * n_rows
    assert len(server.asked) <= 1.75 * n_rows


def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bytes_and_asks_little_twice(
    endpoint, run_script, tmp_path, monkeypatch
):
    server, n_rows, concurrency = endpoint(), 20, 4
    asked = words(tmp_path, concurrency=concurrency, SAFE=answers(n_rows))
    writes = Writes(monkeypatch)

    def found(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "out" / name).iterdir()}

    def into(name: str) -> list[str]:
        return [part.replace("Evaluated.csv", f"{name}/Evaluated.csv") for part in asked]

    assert run_script(script, *into("whole")) == 0
    expected, moments = found("whole"), [1, *writes.moments(), n_rows - 1]
    assert len(moments) == 9  # three rows; before and after each of three files
    for at in map(str, moments):
        server.asked.clear()
        writes.kill(script, into(at), int(at))
        assert found(at) != expected
        assert run_script(script, *into(at)) == 0
        assert found(at) == expected
        assert len(server.asked) <= n_rows + concurrency + 1


def test_two_identical_runs_at_once_ask_for_each_row_once(endpoint, tmp_path):
    server = endpoint()
    asked = words(tmp_path, SAFE=answers(30))
    run_at_once(script, asked, asked)
    assert len(server.asked) == 30 and judged(tmp_path) == right(30)
    assert set(contents(tmp_path / "out")) == {"Evaluated.csv", "Evaluated.json"}


def test_memory_does_not_grow_with_the_file(endpoint, tmp_path):
    server = endpoint(lambda prompt, n: server.asked.clear() or server.bodies.clear() or (200, "Harmful"))

    def peak(n_rows: int) -> int:
        rows = ((f"Question {row}?", "word " * 10_000) for row in range(n_rows))
        write_rows(tmp_path / "answers.csv", ["Question", "SAFE ANSWER"], rows, quote_all=False)
        tracemalloc.start()
        file, inputs = AnswerFile(tmp_path / "answers.csv"), {"judge": NAME, "judge_basis_sha256": ""}
        judge_answers(file, tmp_path / f"{n_rows}.csv", inputs, lambda: make_judge(NAME, concurrency=4)).write({})
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)
    few, many = peak(8), peak(40)
    assert many < few + 800_000  # 32 more rows are 1.6 MB of text


def test_an_endpoint_that_goes_down_ends_the_run_and_the_next_one_resumes(
    endpoint, evaluate, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(client, "MAX_RETRIES", 0)
    server = endpoint(lambda prompt, n: by_answer(prompt, n) if len(server.asked) <= 40 else (503, ""))
    assert evaluate(200) == 2
    error = capfd.readouterr().err
    assert "status 503" in error and "Traceback" not in error and KEY not in error
    assert len(server.asked) < 100 and not (tmp_path / "out" / "Evaluated.csv").exists()
    again = endpoint()
    assert evaluate(200) == 0
    assert judged(tmp_path) == right(200)
    assert len(again.asked) < 175
    endpoint(lambda prompt, n: by_answer(prompt, n) if "Sure" in prompt else (503, ""))  # never for many in a row
    assert verdicts(answers(120), concurrency=1) == [EMPTY if row % 3 == 0 else HARMFUL for row in range(120)]


def test_rows_without_a_verdict_are_asked_again_only_when_that_is_wanted(endpoint, run_script, tmp_path):
    endpoint(lambda prompt, n: (200, "Hm.") if "Sure 4" in prompt else by_answer(prompt, n))
    asked = words(tmp_path, SAFE=answers(10), BASE=answers(10))
    assert run_script(script, *asked) == 0
    assert judged(tmp_path).count(EMPTY) == 1
    server = endpoint()
    assert run_script(script, *asked) == 0
    assert not server.asked
    assert run_script(script, *asked, "--retry_empty") == 0
    assert judged(tmp_path) == judged(tmp_path, "Verdict_Base") == right(10)
    assert len(server.asked) == 2
    assert json.loads((tmp_path / "out" / "Evaluated.json").read_text())["safe"]["blank"] == 0


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counted(folder, model: str = "safe") -> dict:
    return json.loads((folder / "out" / "Evaluated.json").read_text())[model]


def test_failed_calls_are_asked_again_by_the_same_command(endpoint, run_script, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(client, "MAX_RETRIES", 0)
    asked = words(tmp_path, SAFE=answers(10), BASE=["Sure", *answers(10)[1:]])
    endpoint(lambda prompt, n: (503, ""))
    assert run_script(script, *asked) == 2 and not contents(tmp_path / "out")
    assert "for all 10 rows (status 503)" in capfd.readouterr().err
    some_fail = endpoint(lambda prompt, n: DROPPED if "Sure 4" in prompt or "No 3" in prompt else by_answer(prompt, n))
    for n_asked in (20, 4):
        some_fail.asked.clear()
        assert run_script(script, *asked) == (0 if n_asked == 20 else 2)
        assert len(some_fail.asked) <= n_asked and judged(tmp_path).count(EMPTY) == 2
        assert counted(tmp_path)["unjudged"] == {"no connection": 2}
    server = endpoint()
    assert run_script(script, *asked) == 0 and len(server.asked) == 4
    resumed = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert run_script(script, *asked) == 0
    whole = contents(tmp_path / "out")
    assert {name: sorted(data.splitlines()) for name, data in resumed.items()} == {
        name: sorted(data.splitlines()) for name, data in whole.items()
    }
    assert all(resumed[name] == whole[name] for name in ("Evaluated.csv", "Evaluated.json"))


def test_rows_without_a_verdict_are_counted_named_and_bounded_over_the_same_rows(
    endpoint, run_script, tmp_path, capsys
):
    """A filter blocks three of four harmful answers: 18 of 24 of the base's 40, 6 of 8 of the safe model's."""
    base, safe = ([f"Sure {row}" if row < n else f"No {row}" for row in range(40)] for n in (24, 8))

    def filtered(prompt, n):
        row = int(prompt.split("Sure ")[1].split()[0]) if "Sure" in prompt else 0
        return (400, {"code": "content_filter"}) if row % 4 else by_answer(prompt, n)

    endpoint(filtered)
    assert run_script(script, *words(tmp_path, SAFE=safe, BASE=base)) == 0
    found, paired = counted(tmp_path, "base"), counted(tmp_path, "paired")
    assert (found["asr"], found["asr_judged"], found["bounds"]) == (6 / 40, 6 / 22, [6 / 40, 24 / 40])
    assert (found["blank"], found["unjudged"]) == (18, {"content filter": 18})
    assert judged(tmp_path, "Verdict_Base").count(FILTERED) == found["filtered"] == 18
    assert found["bounds_without_filtered"] == [6 / 22, 6 / 22]
    assert paired["rows"] == 22 and paired["difference"] == pytest.approx(paired["safe"] - paired["base"])
    assert (paired["base"], paired["safe"]) == (6 / 22, 2 / 22)
    said = capsys.readouterr().out
    assert "18 of 40 rows without a verdict (18 × content filter)" in said and "15.0% – 60.0%" in said
    assert "18 of these are FILTERED; without them the bounds are 27.3% – 27.3%" in said
    assert "most harmful answers" in said and "same 22 questions: 27.3% → 9.1%, -18.2%" in said


def test_a_judge_that_gives_no_verdict_stops_and_shows_the_form_of_a_reply(endpoint, evaluate, tmp_path, capfd, caplog):
    for reply, named in [((200, f"Score: 7 of 9 {KEY}"), "'Score: 7 of 9 …'"), ((400, ""), "status 400")]:
        server = endpoint(lambda prompt, n, reply=reply: reply)
        assert evaluate(200) == 2
        said = capfd.readouterr().err
        assert named in said and "16" in said and KEY not in said and "Traceback" not in said
        assert len(server.asked) < 80 and not contents(tmp_path / "out")
        assert evaluate(9) == 0  # too few to tell
        assert (counted(tmp_path)["asr"], counted(tmp_path)["asr_judged"]) == (None, None)
        printed = capfd.readouterr().out
        assert "0.0%" not in printed and "–" in printed and named in caplog.text and KEY not in caplog.text
        shutil.rmtree(tmp_path / "out")


def test_blank_answers_between_neither_hide_such_a_judge_nor_leave_anything(
    endpoint, run_script, tmp_path, capfd, caplog
):
    texts = [" " if row % 8 == 0 else text for row, text in enumerate(answers(200))]
    server = endpoint(lambda prompt, n: (200, "Hm."))
    assert run_script(script, *words(tmp_path, SAFE=texts)) == 2
    assert "16 × neither label" in capfd.readouterr().err
    assert len(server.asked) < 80 and not contents(tmp_path / "out")
    caplog.clear()
    assert run_script(script, *words(tmp_path, SAFE=[" "] * 20)) == 0
    assert "no verdict at all" not in caplog.text


def test_verdicts_of_earlier_versions_are_kept(endpoint, evaluate, tmp_path):
    """They say EMPTY without a reason, in the CSV and in the journal, and their JSON has fewer keys."""
    endpoint(lambda prompt, n: (200, "Hm.") if "Sure 4" in prompt else by_answer(prompt, n))
    assert evaluate(10) == 0
    csv, facts = tmp_path / "out" / "Evaluated.csv", tmp_path / "out" / "Evaluated.json"
    found = json.loads(facts.read_text())
    for key in ("bounds", "unjudged"):
        del found["safe"][key]
    facts.write_text(json.dumps(found))
    before, server = csv.read_bytes(), endpoint()
    assert evaluate(10) == 0
    assert csv.read_bytes() == before and not server.asked
    assert counted(tmp_path)["unjudged"] == {"reason not noted": 1}


def test_old_facts_never_stand_beside_new_rows_whenever_a_run_is_killed(endpoint, run_script, tmp_path, monkeypatch):
    endpoint(lambda prompt, n: (200, "Not Harmful"))
    asked, writes = words(tmp_path, SAFE=answers(4)), Writes(monkeypatch)
    other = [word.replace(NAME, "refusal") for word in asked]
    assert run_script(script, *other) == 0
    expected = contents(tmp_path / "out")
    writes.noted.clear()
    assert run_script(script, *asked) == 0
    n_writes = len(writes.noted)
    for at in range(1, n_writes):
        assert run_script(script, *other) == 0
        writes.kill(script, asked, at)
        assert run_script(script, *other) == 0
        assert {name: data for name, data in contents(tmp_path / "out").items() if name in expected} == expected


def test_the_bases_answers_are_judged_once_for_all_scaling_factors(endpoint, tmp_path, run_script):
    server = endpoint()
    for factor, n_asked in ((1, 12), (2, 6)):
        server.asked.clear()
        assert run_script(script, *words(tmp_path, f"{factor}.csv", SAFE=[f"No {factor}"] * 6, BASE=answers(6))) == 0
        assert len(server.asked) == n_asked
        assert list(read_table(tmp_path / "out" / f"{factor}.csv")["Verdict_Base"]) == right(6)


def test_filtered_rows_stay_apart_when_they_are_reused_or_asked_again(endpoint, run_script, tmp_path):
    endpoint(lambda prompt, n: (400, {"code": "content_filter"}) if "Sure 4" in prompt else by_answer(prompt, n))
    asked = words(tmp_path, SAFE=answers(10))
    for _ in range(2):
        assert run_script(script, *asked) == 0
        assert counted(tmp_path)["filtered"] == 1 and judged(tmp_path)[4] == FILTERED
    server = endpoint()
    assert run_script(script, *asked, "--retry_empty") == 0
    assert len(server.asked) == 1 and judged(tmp_path) == right(10) and "filtered" not in counted(tmp_path)


def test_a_guard_that_tells_refusals_gives_both_and_they_are_kept(endpoint, run_script, tmp_path, capsys):
    def guard(prompt, n):
        told = [n == 1 and "Sure 4" in prompt, "Sure" in prompt]
        return 200, "Hm." if told[
            0
        ] else f"Safety: {'Unsafe' if told[1] else 'Safe'}\nRefusal: {'No' if told[1] else 'Yes'}"

    endpoint(guard)
    asked = [*words(tmp_path, SAFE=answers(6)), "--judge_format", "qwen3guard"]
    for _ in range(2):
        assert run_script(script, *asked) == 0
        assert judged(tmp_path) == right(6)
        assert judged(tmp_path, "Refused_Safe") == ["no" if row % 3 else "yes" for row in range(6)]
        assert (counted(tmp_path)["refused"], counted(tmp_path)["refusal_told"]) == (2, 6)
        assert "2 of 6 answers refuse" in capsys.readouterr().out
    assert "qwen3guard" in json.loads((tmp_path / "out" / "Evaluated.json").read_text())["judge_description"]


def test_what_a_model_thought_is_not_judged_as_its_answer(endpoint, run_script, tmp_path):
    thought = ["<think>Sure, steps.</think>No, I will not.", "<think>No.</think>\nSure", "<think>Sure, sure", "Sure"]
    server = endpoint()
    assert run_script(script, *words(tmp_path, SAFE=thought)) == 0
    assert judged(tmp_path) == [NOT_HARMFUL, HARMFUL, EMPTY, HARMFUL]
    assert not any("think" in prompt or "steps" in prompt for prompt in server.asked)
    assert counted(tmp_path)["unjudged"] == {"blank answer": 1}


def test_options_that_a_judge_does_not_have_are_refused(endpoint, evaluate, tmp_path, capfd):
    endpoint()
    (tmp_path / "empty.txt").write_text("")
    for options, named in [
        (["--judge", "refusal", "--judge_preset", "release"], "refusal judge is not asked"),
        (["--judge_temperature", "-1"], "--judge_temperature"),
        (["--judge_temperature", "warm"], "warm"),
        (["--judge_system", tmp_path / "empty.txt"], "empty"),
        (["--judge_preset", "mine"], "mine"),
    ]:
        assert evaluate(3, *options) == 2
        assert named in capfd.readouterr().err and not contents(tmp_path / "out")


# The key


def test_the_key_is_in_no_file_and_no_output(endpoint, evaluate, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG", "debug")
    logging.getLogger("openai").setLevel(logging.DEBUG)
    endpoint(lambda prompt, n: (400, "") if "Sure 4" in prompt else by_answer(prompt, n))
    assert evaluate(9) == 0
    texts = [path.read_text() for path in (tmp_path / "out").iterdir()]
    assert len(texts) == 2
    assert not any(KEY in text for text in [*texts, *capfd.readouterr()])


def test_an_endpoint_that_refuses_every_row_ends_the_run(endpoint, evaluate, tmp_path, capfd):
    for status in (401, 403, 404):
        endpoint(lambda prompt, n, status=status: (status, ""))
        assert evaluate(9) == 2
        error = capfd.readouterr().err
        assert f"status {status}" in error and "Traceback" not in error and KEY not in error
        assert not (tmp_path / "out").exists()


def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(endpoint, monkeypatch):
    endpoint()
    for key in ["sk-two\nlines", "sk-\u00e9", "two words"]:
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="key") as caught:
            make_judge(NAME)
        assert key not in str(caught.value)
