"""Languages: those of public question sets are known, and a user's file adds others or is refused in a sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from soteria.languages import ADDED, PAPER_LANGUAGES, find_language, names_a_language

SRC = Path(__file__).resolve().parents[1] / "src"
SERBIAN = {"name": "Serbian", "code": "sr", "instruction": "Одговори директно на питање.", "aliases": ["srp"]}


def test_languages_of_public_sets_have_an_instruction_and_no_tier():
    for name in ("ita", "vi", "Korean", "jv", "ja-JP", "ru_RU"):
        assert find_language(name).instruction and find_language(name).tier is None
    assert find_language("sp").name == "Spanish" and len(PAPER_LANGUAGES) == 12


def test_any_languages_name_or_code_is_known_as_one():
    assert all(map(names_a_language, ("sr", "srp", "Serbian", "tgl", "filipino", "hi_Deva", "zh-Hant", "hin", "ms")))
    assert not any(map(names_a_language, ("train", "test", "default", "main", "harmful", "benign", "or-bench-80k")))


def looked_up(tmp_path, given: object, name: str) -> subprocess.CompletedProcess:
    (tmp_path / "more.json").write_text(json.dumps(given, ensure_ascii=False), encoding="utf-8")
    code = f"from soteria import cli, languages; cli.run(lambda: print(languages.find_language({name!r})))"
    environment = os.environ | {ADDED: str(tmp_path / "more.json"), "PYTHONPATH": str(SRC), "PYTHONUTF8": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_a_users_file_adds_a_language(tmp_path):
    for name in ("Serbian", "sr-RS", "srp"):
        done = looked_up(tmp_path, [SERBIAN], name)
        assert done.returncode == 0 and "Одговори" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([SERBIAN | {"code": "hi"}], "'hi', which already means Hindi"),
        ([SERBIAN, SERBIAN], "already means Serbian"),
        ([SERBIAN | {"instruction": " "}], "must list objects"),
        ([SERBIAN | {"tier": "Low"}], "must list objects"),
        (["sr"], "must list objects"),
    ],
)
def test_a_wrong_file_of_languages_is_refused(tmp_path, given, named):
    done = looked_up(tmp_path, given, "Hindi")
    assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr
