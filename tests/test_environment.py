"""The scripts around the library: the virtual environment that they make, and the words and folders they hand on."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from soteria.judging import pipeline
from soteria.storage import paths

ROOT = Path(__file__).resolve().parents[1]

# Stands for python3.11, and for the python of a virtual environment: pip notes what it installs in `installed`.
PYTHON = """#!/bin/bash
here=$(dirname "$0")
case "$*" in
  "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && touch .venv/pip .venv/bin/activate ;;
  "-m pip --version") [ -f "$here/../pip" ] ;;
  "-m pip install "*)
    echo "${@: -1}" >>installed
    while [ -f hold ]; do sleep 0.01; done
    if [ -f broken ]; then exit 1; fi ;;
  *) printf '%s\\n' "$@" >words ;;
esac
"""


@pytest.fixture
def fresh(tmp_path) -> Path:
    """A fresh clone, as far as the shell scripts see, with a Python that does next to nothing."""
    root = tmp_path / "clone"
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("*.py"))
    for name in ("requirements.txt", "requirements-utility.txt", "src/reproduce.py"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(name)
    (root / "bin").mkdir()
    for name in ("python3.11", "python3", "python"):
        (root / "bin" / name).write_text(PYTHON)
        (root / "bin" / name).chmod(0o755)
    return root


def start(root: Path, command: str, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "PATH": f"{root / 'bin'}:{os.environ['PATH']}", **variables}
    environment.pop("SOTERIA_RESULTS", None) if "SOTERIA_RESULTS" not in variables else None
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(["bash", "-c", f"set -euo pipefail; {command}"], cwd=root, env=environment, **options)


SETUP = "cd .; source scripts/environment.sh"


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def installed(root: Path) -> list[str]:
    return (root / "installed").read_text().split()


@pytest.mark.parametrize("left", ["nothing", "no pip", "no activate", "half a package"])
def test_a_first_set_up_recovers_from_whatever_was_interrupted_and_a_second_installs_nothing(fresh, left):
    venv = fresh / ".venv"
    if left != "nothing":
        (venv / "bin").mkdir(parents=True)
        shutil.copy(fresh / "bin" / "python3", venv / "bin" / "python")
    if left in ("no pip", "half a package"):
        (venv / "bin" / "activate").touch()
    if left in ("no activate", "half a package"):
        (venv / "pip").touch()
    half = venv / "lib" / "python3.11" / "site-packages" / "torch.dist-info"
    if left == "half a package":
        half.mkdir(parents=True)
    for _ in range(2):
        child = start(fresh, SETUP)
        assert child.communicate() == ("", "") and child.returncode == 0
    assert installed(fresh) == ["requirements.txt"] and not half.exists()


def test_an_installation_that_fails_ends_in_one_sentence_and_is_tried_again(fresh):
    (fresh / "broken").touch()
    child = start(fresh, SETUP)
    said = child.communicate()[1]
    assert child.returncode == 2 and said.startswith("error: requirements.txt cannot be installed")
    (fresh / "broken").unlink()
    assert start(fresh, SETUP).wait() == 0
    assert installed(fresh) == ["requirements.txt"] * 2


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_during_the_set_up_is_not_taken_for_a_network_that_fails(fresh, number, said):
    (fresh / "hold").touch()
    child = start(fresh, SETUP)
    wait_for(fresh / "installed")
    os.killpg(child.pid, number)
    shown = child.communicate()[1]  # the shell itself notes a command that a signal ends
    assert shown.endswith(f"{said}; run the same command again to resume\n") and "error" not in shown
    assert child.returncode == 128 + number


# Stands for the python of run.sh: its plan, and a first step that works until it is told to end.
STEPS = """#!/bin/bash
case "$*" in
  "-m soteria.judging.pipeline "*) printf '%s\\0' model answers verdicts 2 --judge refusal ;;
  *) trap 'trap "" TERM; echo "terminated; run" >&2; exit 143' TERM; touch started; while :; do sleep 0.01; done ;;
esac
"""


@pytest.mark.parametrize("whole_group", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_run_sh_ends_the_step_that_runs_and_says_so_once(fresh, number, whole_group):
    (fresh / "bin" / "python3").write_text(STEPS)
    child = start(fresh, "exec bash scripts/run.sh 1 2 3 4 5 6 7 8")
    wait_for(fresh / "started")
    (os.killpg if whole_group else os.kill)(child.pid, number)
    assert child.communicate()[1].count("; run") == 1 and child.returncode == 128 + number
    with pytest.raises(ProcessLookupError):  # nothing goes on
        os.killpg(child.pid, 0)


def test_run_sh_hands_on_the_judges_and_options_that_were_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    pair = [str(ROOT / "data" / "models" / f"polyglot-{kind}") for kind in ("tuned", "base")]
    arguments = [*pair, "Hindi", "policy_Hindi", "2", "yes", "8", str(tmp_path)]
    cases = {
        (): ["2", "--judge", "refusal"],
        (("JUDGE", " "), ("QUESTION_COLUMN", " ")): ["2", "--judge", "refusal"],
        (("JUDGE", "refusal\u00a0refusal"), ("PRESET", "release")): ["2", "--judge", "refusal"],
        (("JUDGE", "refusal\nopenai:m"), ("PRESET", "release")): [
            *("4", "--judge", "refusal", "openai:m", "--judge_preset=release")
        ],
        (("JUDGE", "openai:m"), ("PRESET", "release"), ("JUDGE_PRESET", "harmbench")): [
            *("3", "--judge", "openai:m", "--judge_preset=harmbench")
        ],
    }
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    for variables, handed_on in cases.items():
        with monkeypatch.context() as patch:
            for name, value in variables:
                patch.setenv(f"SOTERIA_{name}", value)
            words = pipeline.plan(arguments)
        assert words[3 : 4 + int(words[3])] == handed_on and "--question_column= " not in words


def test_scripts_are_found_through_links_and_whatever_cdpath_holds(fresh):
    other = fresh / "other"
    (other / "scripts").mkdir(parents=True)
    (other / "reproduce").symlink_to(fresh / "scripts" / "reproduce.sh")
    (other / "demo").symlink_to(fresh / "scripts" / "demo.sh")
    for command in ("bash other/reproduce x", "bash other/demo", "bash scripts/demo.sh"):
        child = start(fresh, command, CDPATH=str(other))
        assert child.communicate() == ("", "") and child.returncode == 0
        assert (fresh / "words").read_text().startswith("src/reproduce.py\n")
        (fresh / "words").unlink()


@pytest.mark.parametrize(
    ("command", "variables", "said"),
    [
        ("reproduce.sh x", {"SOTERIA_PROCESSES": "two"}, "error: SOTERIA_PROCESSES"),
        ("reproduce.sh x", {"SOTERIA_PROCESSES": "0"}, "error: SOTERIA_PROCESSES"),
        ("demo.sh --all --results x", {}, "usage: "),
    ],
)
def test_words_that_a_script_would_pass_over_are_refused(fresh, command, variables, said):
    child = start(fresh, f"bash scripts/{command}", **variables)
    shown = child.communicate()[1]
    assert child.returncode == 2 and shown.startswith(said) and shown.count("\n") == 1
    assert not (fresh / ".venv").exists()


def test_a_copy_of_reproduce_sh_elsewhere_says_where_to_call_it_from(fresh):
    (fresh / "spool" / "job").mkdir(parents=True)
    shutil.copy(fresh / "scripts" / "reproduce.sh", fresh / "spool" / "job")
    child = start(fresh, "unset SLURM_SUBMIT_DIR; bash spool/job/reproduce.sh x")
    assert child.communicate()[1].startswith("error: ") and child.returncode == 2


def test_of_two_at_once_one_waits_and_says_so(fresh):
    (fresh / "hold").touch()
    first = start(fresh, SETUP)
    wait_for(fresh / "installed")
    second = start(fresh, SETUP)
    assert second.stderr.readline() == "waiting for another process that is making .venv\n"
    (fresh / "hold").unlink()
    assert (first.wait(), second.wait()) == (0, 0)
    assert installed(fresh) == ["requirements.txt"]


def test_reproduce_takes_the_users_paths_from_the_users_folder(fresh):
    (fresh / "user").mkdir()
    (fresh / "user" / "a grid.yaml").touch()
    script, user = "cd user; bash ../scripts/reproduce.sh", fresh / "user"
    cases = {
        "'a grid.yaml' --results 'my out'": [f"{user}/a grid.yaml", "--results", f"{user}/my out"],
        "configs/x.yaml --results=/out --plan": ["configs/x.yaml", "--results", "/out", "--plan"],
        "--plan 'a grid.yaml'": ["--plan", f"{user}/a grid.yaml"],
        "--results ../out configs/x.yaml": ["--results", f"{user}/../out", "configs/x.yaml"],
    }
    for words, handed_on in cases.items():
        assert start(fresh, f"{script} {words}").wait() == 0
        assert (fresh / "words").read_text().splitlines() == ["src/reproduce.py", *handed_on]
    assert start(fresh, "cd user; cd ..; source scripts/environment.sh; env >words", SOTERIA_RESULTS="mine").wait() == 0
    assert f"SOTERIA_RESULTS={user / 'mine'}" in (fresh / "words").read_text().splitlines()
