"""A judge behind an endpoint: what it is asked, what its faults do, what is kept, and that nothing shows the key."""

import asyncio
import json
import logging
import random
import threading
import time
import tracemalloc

import pandas as pd
import pytest
from conftest import run_in_child
from fake_endpoint import DROPPED, KEY, TRUNCATED, FakeEndpoint
from kills import Writes

import judge as script
from soteria.errors import UserError
from soteria.judging import endpoint as endpoint_judge
from soteria.judging.interface import EMPTY, HARMFUL, JUDGE_PROMPT, NOT_HARMFUL, fill_prompt
from soteria.judging.judges import make_judge
from soteria.judging.verdicts import AnswerFile, judge_answers
from soteria.storage.csv_files import read_table, write_rows, write_table

NAME = "openai:some-model"


def by_answer(prompt: str, n: int) -> tuple[int, str]:
    return 200, "Harmful" if "Sure" in prompt else "Not Harmful"


@pytest.fixture
def endpoint(monkeypatch):
    """`endpoint(reply)` starts a fake endpoint that the openai client's own variables lead to."""
    started = []
    monkeypatch.delenv("AZURE_OPENAI_ENDPOINT", raising=False)

    def start(reply=by_answer, **options) -> FakeEndpoint:
        started.append(FakeEndpoint(reply, **options))
        monkeypatch.setenv("OPENAI_BASE_URL", f"{started[-1].address}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        return started[-1]

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


def verdicts(answers: list[str], **options) -> list[str]:
    judge = make_judge(NAME, **options)
    found = dict(judge.judge((row, "Why?", answer) for row, answer in enumerate(answers)))
    return [found[row] for row in range(len(answers))]


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
    endpoint(refuses="temperature")
    assert verdicts(["Sure 1", "Sure 2", "No 3"], concurrency=3) == [HARMFUL, HARMFUL, NOT_HARMFUL]


def test_a_nonsense_reply_is_asked_once_more_and_then_is_no_verdict(endpoint):
    for text in ["Hm.", "", None, "Harmful or Not Harmful"]:
        server = endpoint(lambda prompt, n, text=text: (200, text if n == 1 or "bad" in prompt else "Harmful"))
        assert verdicts(["Sure", "bad"]) == [HARMFUL, EMPTY]
        assert len(server.asked) == 4


def test_a_passing_fault_is_asked_again_and_one_that_stays_is_no_verdict(endpoint, monkeypatch, caplog):
    monkeypatch.setattr(endpoint_judge, "MAX_RETRIES", 2)
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
    monkeypatch.setattr(endpoint_judge, "MAX_RETRIES", 0)
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
    assert len(moments) == 7  # three rows; before and after each of two files
    for at in map(str, moments):
        server.asked.clear()
        writes.kill(script, into(at), int(at))
        assert found(at) != expected
        assert run_script(script, *into(at)) == 0
        assert found(at) == expected
        assert len(server.asked) <= n_rows + concurrency + 1


def test_memory_does_not_grow_with_the_file(endpoint, tmp_path):
    server = endpoint(lambda prompt, n: server.asked.clear() or (200, "Harmful"))

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
    monkeypatch.setattr(endpoint_judge, "MAX_RETRIES", 0)
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


def test_the_bases_answers_are_judged_once_for_all_scaling_factors(endpoint, tmp_path, run_script):
    server = endpoint()
    for factor, n_asked in ((1, 12), (2, 6)):
        server.asked.clear()
        assert run_script(script, *words(tmp_path, f"{factor}.csv", SAFE=[f"No {factor}"] * 6, BASE=answers(6))) == 0
        assert len(server.asked) == n_asked
        assert list(read_table(tmp_path / "out" / f"{factor}.csv")["Verdict_Base"]) == right(6)


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
        assert not list((tmp_path / "out").iterdir())


def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(endpoint, monkeypatch):
    endpoint()
    for key in ["sk-two\nlines", "sk-\u00e9", "two words"]:
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="key") as caught:
            make_judge(NAME)
        assert key not in str(caught.value)
