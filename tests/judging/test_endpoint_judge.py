"""A judge behind an endpoint: what it is asked, what its faults do, what is kept, and that nothing shows the key."""

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

import judge as script
from soteria.errors import UserError
from soteria.judging import endpoint as endpoint_judge
from soteria.judging.interface import EMPTY, HARMFUL, JUDGE_PROMPT, NOT_HARMFUL, fill
from soteria.judging.judges import make_judge
from soteria.judging.verdicts import Answers, judge_all
from soteria.storage.csv_files import read_table, write_rows, write_table

NAME = "openai:some-model"


@pytest.fixture
def endpoint(monkeypatch):
    """`endpoint(reply)` starts a fake endpoint that the openai client's own variables lead to."""
    started = []
    monkeypatch.delenv("AZURE_OPENAI_ENDPOINT", raising=False)

    def start(reply, **options) -> FakeEndpoint:
        started.append(FakeEndpoint(reply, **options))
        monkeypatch.setenv("OPENAI_BASE_URL", f"{started[-1].address}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        return started[-1]

    yield start
    for one in started:
        one.close()


def by_answer(prompt: str, n: int) -> tuple[int, str]:
    return 200, "Harmful" if "Sure" in prompt else "Not Harmful"


def verdicts(answers: list[str], **options) -> list[str]:
    judge = make_judge(NAME, **options)
    found = dict(judge.judge((row, "Why?", answer) for row, answer in enumerate(answers)))
    return [found[row] for row in range(len(answers))]


# What it is asked


def test_labels_go_to_their_rows(endpoint):
    server = endpoint(by_answer)
    answers = [f"{'Sure' if row % 3 else 'No'} {row}" for row in range(20)]
    assert verdicts(answers) == [HARMFUL if row % 3 else NOT_HARMFUL for row in range(20)]
    assert server.keys == {f"Bearer {KEY}"}


def test_the_filled_judge_prompt_is_asked(endpoint):
    server = endpoint(by_answer)
    verdicts(["Sure {question}"])
    assert server.asked == [fill(JUDGE_PROMPT, "Why?", "Sure {question}")]


def test_a_blank_answer_is_not_asked(endpoint):
    server = endpoint(by_answer)
    assert verdicts([" ", ""]) == [EMPTY, EMPTY]
    assert not server.asked


def test_azures_variables_lead_to_azure(endpoint, monkeypatch):
    server = endpoint(by_answer)
    for name, value in {"ENDPOINT": server.address, "API_KEY": KEY}.items():
        monkeypatch.setenv(f"AZURE_OPENAI_{name}", value)
    monkeypatch.setenv("OPENAI_API_VERSION", "2025-01-01")
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")
    assert verdicts(["Sure", "No"]) == [HARMFUL, NOT_HARMFUL]
    assert server.keys == {KEY}


def test_a_judge_can_be_used_where_an_event_loop_runs_already(endpoint):
    import asyncio

    async def cell():
        return verdicts(["Sure", "No"])

    endpoint(by_answer)
    assert asyncio.run(cell()) == [HARMFUL, NOT_HARMFUL]


def test_no_more_calls_at_once_than_asked_for_and_rows_are_taken_as_they_are_needed(endpoint):
    taken = 0

    def slowly(prompt, n):
        time.sleep(0.005)
        return by_answer(prompt, n)

    def rows():
        nonlocal taken
        for row in range(60):
            taken += 1
            yield row, "Why?", f"Sure {row}"

    server = endpoint(slowly)
    for at, _ in enumerate(make_judge(NAME, concurrency=4).judge(rows())):
        assert taken <= at + 1 + 4
    assert 2 <= server.most_at_once <= 4


def test_a_model_that_takes_no_temperature_is_asked_without(endpoint):
    endpoint(by_answer, refuses="temperature")
    assert verdicts(["Sure 1", "Sure 2", "No 3"], concurrency=3) == [HARMFUL, HARMFUL, NOT_HARMFUL]


# What its faults do


def test_a_nonsense_reply_is_asked_once_more(endpoint):
    server = endpoint(lambda prompt, n: (200, "Hm." if n == 1 else "Harmful"))
    assert verdicts(["Sure"]) == [HARMFUL]
    assert len(server.asked) == 2


@pytest.mark.parametrize("text", ["Hm.", "", None, "Harmful or Not Harmful"])
def test_nonsense_twice_is_no_verdict(text, endpoint):
    server = endpoint(lambda prompt, n: (200, text))
    assert verdicts(["Sure"]) == [EMPTY]
    assert len(server.asked) == 2


@pytest.mark.parametrize("fault", [(429, ""), (500, ""), (503, ""), (408, ""), DROPPED, TRUNCATED])
def test_a_passing_fault_is_asked_again(fault, endpoint):
    server = endpoint(lambda prompt, n: fault if n < 3 else (200, "Harmful"))
    assert verdicts(["Sure"]) == [HARMFUL]
    assert len(server.asked) == 3


def test_the_time_that_an_endpoint_asks_for_is_waited(endpoint):
    times = []

    def reply(prompt, n):
        times.append(time.monotonic())
        return (429, "") if n == 1 else (200, "Harmful")

    endpoint(reply, retry_after_ms=1300)
    verdicts(["Sure"])
    assert times[1] - times[0] >= 1.3


@pytest.mark.parametrize("fault", [(500, ""), DROPPED, TRUNCATED])
def test_a_fault_that_stays_is_no_verdict_and_the_other_rows_have_theirs(fault, endpoint, monkeypatch, caplog):
    monkeypatch.setattr(endpoint_judge, "MAX_RETRIES", 1)
    endpoint(lambda prompt, n: fault if "bad" in prompt else by_answer(prompt, n))
    assert verdicts(["bad", "Sure", "No"]) == [EMPTY, HARMFUL, NOT_HARMFUL]
    assert "1 rows without a verdict" in caplog.text


def test_a_row_that_the_endpoint_will_not_read_is_no_verdict_and_not_asked_again(endpoint):
    server = endpoint(lambda prompt, n: (400, "") if "bad" in prompt else by_answer(prompt, n))
    assert verdicts(["bad", "Sure"]) == [EMPTY, HARMFUL]
    assert len(server.asked) == 2


def test_a_reply_that_takes_too_long_is_no_verdict(endpoint, monkeypatch):
    monkeypatch.setattr(endpoint_judge, "MAX_RETRIES", 0)

    def reply(prompt, n):
        time.sleep(1.0 if "slow" in prompt else 0)
        return 200, "Harmful"

    endpoint(reply)
    assert verdicts(["slow", "Sure"], time_limit=0.3) == [EMPTY, HARMFUL]


def test_an_interruption_asks_no_more_and_does_not_wait_for_replies(endpoint):
    release = threading.Event()

    def reply(prompt, n):
        if "wait" in prompt:
            release.wait(20)
        return 200, "Harmful"

    server = endpoint(reply)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        for _ in make_judge(NAME, concurrency=2).judge((row, "Why?", "wait" if row else "go") for row in range(50)):
            raise KeyboardInterrupt
    assert time.monotonic() - started < 10
    release.set()
    assert len(server.asked) <= 3


# judge.py


@pytest.fixture
def evaluate(run_script, tmp_path):
    """`evaluate(n rows)` judges so many answers, every third of which declines, and gives the status."""

    def run(n_rows: int, *options: object) -> int:
        answers = [f"Sure {row}" if row % 3 else f"No {row}" for row in range(n_rows)]
        questions = [f"Question {row}?" for row in range(n_rows)]
        write_table(pd.DataFrame({"Question": questions, "SAFE ANSWER": answers}), tmp_path / "answers.csv")
        return run_script(script, *command(tmp_path), *options)

    return run


def command(folder, output="Evaluated.csv") -> list[str]:
    words = ["--input", folder / "answers.csv", "--output", folder / "out" / output, "--judge", NAME]
    return list(map(str, words))


def judged(folder) -> list[str]:
    return list(read_table(folder / "out" / "Evaluated.csv")["Verdict_Safe"])


def right(n_rows: int) -> list[str]:
    return [HARMFUL if row % 3 else NOT_HARMFUL for row in range(n_rows)]


def faulty(seed: int):
    """8 % 429, 6 % 500, 3 % dropped connections, 3 % truncated JSON, 4 % nonsense, else the right label."""
    draw, lock = random.Random(seed), threading.Lock()
    nonsense = ["Hm.", "Harmful or Not Harmful?", "{}", "", "I cannot say whether it is harmful.", "Not sure."]

    def reply(prompt, n):
        with lock:
            at, words = draw.random(), draw.choice(nonsense)
        for share, fault in ((0.08, (429, "")), (0.06, (500, "")), (0.03, DROPPED), (0.03, TRUNCATED)):
            if at < share:
                return fault
            at -= share
        return (200, words) if at < 0.04 else by_answer(prompt, n)

    return reply


@pytest.mark.parametrize("seed", range(3))
def test_400_rows_of_a_faulty_endpoint_killed_half_way_have_no_wrong_verdict(seed, endpoint, evaluate, tmp_path):
    n_rows = 400
    server = endpoint(faulty(seed))
    assert evaluate(1) == 0  # writes the rows of one; those of all follow
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    server.asked.clear()
    answers = [f"Sure {row}" if row % 3 else f"No {row}" for row in range(n_rows)]
    table = pd.DataFrame({"Question": [f"Question {row}?" for row in range(n_rows)], "SAFE ANSWER": answers})
    write_table(table, tmp_path / "answers.csv")

    def kill_half_way(process):
        while len(server.asked) < n_rows * 0.6 and process.is_alive():
            time.sleep(0.001)

    run_in_child(script, command(tmp_path), kill_when=kill_half_way)
    journal = tmp_path / "out" / ".Evaluated.csv.journal"
    assert n_rows * 0.2 < len(journal.read_text().splitlines()) < n_rows
    run_in_child(script, command(tmp_path))
    wrong = [(a, b) for a, b in zip(judged(tmp_path), right(n_rows), strict=True) if a not in (b, EMPTY)]
    assert not wrong
    assert judged(tmp_path).count(EMPTY) <= 0.01 * n_rows
    assert len(server.asked) <= 1.75 * n_rows


def test_killed_at_any_moment_and_resumed_the_bytes_are_the_same_and_little_is_asked_twice(
    endpoint, evaluate, tmp_path
):
    def slowly(prompt, n):
        time.sleep(0.004)
        return by_answer(prompt, n)

    server = endpoint(slowly)
    n_rows, concurrency = 40, 4
    assert evaluate(n_rows, "--concurrency", concurrency) == 0

    def run(name: str, kill_after: float | None = None) -> float:
        words = [*command(tmp_path, f"{name}/Evaluated.csv"), "--concurrency", str(concurrency)]
        return run_in_child(script, words, kill_after)

    def found(name: str) -> dict[str, bytes]:
        folder = tmp_path / "out" / name
        return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}

    run("warm")
    seconds = run("whole")
    expected = found("whole")
    draw, stages = random.Random(0), set()
    for index in range(30):
        server.asked.clear()
        run(str(index), draw.uniform(0, seconds))
        stages.add(tuple((name, len(text)) for name, text in sorted(found(str(index)).items())))
        run(str(index))
        assert found(str(index)) == expected
        assert len(server.asked) <= n_rows + concurrency + 1
    assert len(stages) >= 5  # the kills fell into different stages


def test_memory_does_not_grow_with_the_file(endpoint, tmp_path):
    endpoint(lambda prompt, n: (200, "Harmful"), remembers=False)

    def peak(n_rows: int) -> int:
        rows = ((f"Question {row}?", "word " * 20_000) for row in range(n_rows))
        write_rows(tmp_path / "answers.csv", ["Question", "SAFE ANSWER"], rows, quote_all=False)
        tracemalloc.start()
        answers = Answers(tmp_path / "answers.csv")
        judge = make_judge(NAME, concurrency=4)
        inputs = {"judge": NAME, "judge_basis_sha256": ""}
        given, _ = judge_all(judge, answers, tmp_path / f"{n_rows}.csv", inputs, {})
        answers.write_with(given, tmp_path / f"{n_rows}.csv")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)
    few, many = peak(20), peak(200)
    assert many < few + 2_000_000  # 180 rows more are 18 MB of text


def test_an_endpoint_that_is_down_ends_the_run_and_the_next_one_goes_on(
    endpoint, evaluate, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(endpoint_judge, "MAX_RETRIES", 0)
    up = [True]

    def reply(prompt, n):
        if len(server.asked) > 40:
            up[0] = False
        return by_answer(prompt, n) if up[0] else (503, "")

    server = endpoint(reply)
    assert evaluate(200) == 2
    error = capfd.readouterr().err
    assert "status 503" in error and "Traceback" not in error and KEY not in error
    assert not (tmp_path / "out" / "Evaluated.csv").exists()
    server.asked.clear()
    reply_again = endpoint(by_answer)
    assert evaluate(200) == 0
    assert judged(tmp_path) == right(200)
    assert len(reply_again.asked) < 175


def test_rows_without_a_verdict_are_asked_again_when_that_is_wanted(endpoint, evaluate, tmp_path):
    endpoint(lambda prompt, n: (200, "Hm.") if "Sure 4" in prompt else by_answer(prompt, n))
    assert evaluate(10) == 0
    assert judged(tmp_path).count(EMPTY) == 1
    server = endpoint(by_answer)
    assert evaluate(10) == 0
    assert not server.asked
    assert evaluate(10, "--retry_empty") == 0
    assert judged(tmp_path) == right(10)
    assert len(server.asked) == 1
    assert json.loads((tmp_path / "out" / "Evaluated.json").read_text())["safe"]["blank"] == 0


def test_the_bases_answers_are_judged_once_for_all_scaling_factors(endpoint, tmp_path, run_script):
    server = endpoint(by_answer)
    for factor in (1, 2):
        answers = {"SAFE ANSWER": [f"No {factor}"] * 6, "BASE ANSWER": [f"Sure {row}" for row in range(6)]}
        write_table(pd.DataFrame({"Question": list("abcdef"), **answers}), tmp_path / "answers.csv")
        server.asked.clear()
        assert run_script(script, *command(tmp_path, f"Evaluated_{factor}.csv")) == 0
        assert len(server.asked) == (12 if factor == 1 else 6)
    first, second = (read_table(tmp_path / "out" / f"Evaluated_{factor}.csv")["Verdict_Base"] for factor in (1, 2))
    assert list(first) == list(second) == [HARMFUL] * 6


def test_the_key_is_in_no_file_and_no_output(endpoint, evaluate, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG", "debug")
    logging.getLogger("openai").setLevel(logging.DEBUG)
    endpoint(lambda prompt, n: (400, "") if "Sure 4" in prompt else by_answer(prompt, n))
    assert evaluate(9) == 0
    texts = [path.read_text() for path in (tmp_path / "out").iterdir()]
    assert len(texts) == 2
    assert not any(KEY in text for text in [*texts, *capfd.readouterr()])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_endpoint_that_refuses_every_row_ends_the_run_without_saying_the_key(
    status, endpoint, evaluate, tmp_path, capfd
):
    endpoint(lambda prompt, n: (status, ""))
    assert evaluate(9) == 2
    error = capfd.readouterr().err
    assert f"status {status}" in error and "Traceback" not in error and KEY not in error
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("key", ["sk-two\nlines", "sk-\u00e9", "two words"])
def test_a_key_that_cannot_be_sent_is_refused_without_saying_it(key, endpoint, monkeypatch):
    endpoint(by_answer)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="characters that no key has") as caught:
        make_judge(NAME)
    assert key not in str(caught.value)
