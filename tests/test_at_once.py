"""Every step twice at once, and stopped at random moments by each signal: the same files as after one quiet run."""

import importlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from test_bad_input import (
    FINETUNE,
    GENERATE,
    JUDGE,
    ROOT,
    SCORE,
    SELECT,
    STEER,
    TUNED,
    place,  # noqa: F401
)
from tqdm import tqdm

from soteria import cli
from soteria.storage import paths

GRID = "reproduce grid.yaml --results results --device cpu"
STEPS = [FINETUNE + "--max_steps 3", SCORE + "--n_trials 3", SELECT, STEER, GENERATE + "--max_new_tokens 8", JUDGE]
STEPS += [TUNED.replace("--trials 2", "--trials 1"), GRID]
N_MOMENTS = int(os.environ.get("SOTERIA_MOMENTS", 1))  # at which a step is stopped by each signal
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


def name_of(text: str) -> str:
    return text.split()[0]


@pytest.fixture
def fresh(place, tmp_path) -> Callable[[], Path]:  # noqa: F811
    """Makes copies of the folder that the commands are run in, with nothing that they write."""
    kept = {"base", "tuned", "heads", "icl", "effects", "scored"}
    kept |= {"questions.csv", "answers.csv", "pairs.csv"}
    grid = {"name": "g", "models": [{"base": "base", "tuned": "tuned"}], "languages": ["Hindi"], "scaling_factor": 1}
    grid |= {"prompt_sets": ["policy"], "tasks": ["antonym"], "scoring": {"n_trials": 2, "n_shots": 2}}
    grid |= {"answers": {"questions": 3, "max_new_tokens": 4}, "ablations": {"shared": []}}

    def make() -> Path:
        folder = tmp_path / f"place{len(list(tmp_path.iterdir()))}" / "in"
        folder.mkdir(parents=True)
        for name in kept:
            (shutil.copytree if (place / name).is_dir() else shutil.copy)(place / name, folder / name)
        (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
        return folder

    return make


def start(text: str, folder: Path) -> tuple[int, Path]:
    """A script's `main` in a forked process, which takes signals as long as it is at work; gives its standard error."""
    script, *arguments = shlex.split(text)
    main, said = importlib.import_module(script).main, Path(f"{folder}.{time.monotonic_ns()}.err")
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS[:2])
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS[:2])
        return child, said

    def work() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS[:2])
        try:
            main()
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS[:2])

    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        tqdm.set_lock(threading.RLock())
        paths.RESULTS = folder / "results"
        sys.argv, sys.stderr = [f"{script}.py", *arguments], said.open("w", buffering=1)
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        cli.run(work)
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        os._exit(status)


def end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def results_in(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes, but for those that note times."""
    timed = (".json", ".jsonl", ".txt", ".html", ".log")
    return {
        str(path.relative_to(folder)): None if path.suffix in timed else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("text", STEPS, ids=name_of)
def test_a_step_twice_at_once_leaves_what_one_leaves(text, fresh):
    alone, shared = fresh(), fresh()
    assert end_of(start(text, alone)[0]) == 0
    children = [start(text, shared) for _ in range(2)]
    ends = [(end_of(child), said) for child, said in children]
    assert [status for status, _ in ends] == [0, 0], [said.read_text()[-300:] for _, said in ends]
    assert results_in(shared) == results_in(alone)


@pytest.mark.parametrize("text", STEPS, ids=name_of)
def test_a_step_stopped_at_random_moments_by_any_signal_resumes_to_the_same_files(text, fresh):
    whole, moments = fresh(), random.Random(0)
    started = time.monotonic()
    assert end_of(start(text, whole)[0]) == 0
    took = time.monotonic() - started
    for number in SIGNALS * N_MOMENTS:
        folder = fresh()
        child, said = start(text, folder)
        time.sleep(moments.uniform(0, took))
        os.kill(child, number)
        status = end_of(child)
        assert status in (0, -number if number == signal.SIGKILL else 128 + number), said.read_text()
        if status > 0:
            assert re.search(
                r"^(interrupted|terminated); run the same command again to resume$", said.read_text(), re.M
            )
            assert "Traceback" not in said.read_text()
        child, said = start(text, folder)
        assert end_of(child) == 0, said.read_text()
        assert results_in(folder) == results_in(whole), (number, status)
        shutil.rmtree(folder)


def test_two_identical_run_sh_and_one_of_another_language_share_a_results_folder(fresh, monkeypatch):
    folder = fresh()
    shutil.copy(folder / "heads" / "Hindi_Heads.json", folder / "heads" / "Bengali_Heads.json")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, value in {"BENIGN": "none", "BORDERLINE": "none", "MAX_NEW_TOKENS": "4"}.items():
        monkeypatch.setenv(f"SOTERIA_{name}", value)

    def run(language: str, results: str) -> subprocess.Popen:
        words = ["tuned", "base", language, "questions.csv", "1", "yes", "2", "heads"]
        environment = os.environ | {"SOTERIA_RESULTS": str(folder / results)}
        return subprocess.Popen(["bash", ROOT / "scripts" / "run.sh", *words], cwd=folder, env=environment)

    for language in ("Hindi", "Bengali"):
        assert run(language, "alone").wait() == 0
    children = [run(language, "shared") for language in ("Hindi", "Hindi", "Bengali")]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert results_in(folder / "shared") == results_in(folder / "alone")
