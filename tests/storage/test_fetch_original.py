"""The authors' original inputs, from git repositories and a hub on this machine: whole, checked, and only once."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pandas as pd
import pytest
from conftest import ROOT, run_in_child
from local_servers import LocalServers

import fetch_original
from soteria.answering.questions import read_questions
from soteria.errors import UserError
from soteria.languages import find_language
from soteria.scoring.heads import read_heads
from soteria.storage import original
from soteria.storage.original import JOINED, join_xsafety
from soteria.storage.original import XSAFETY_FOLDER as SOURCE

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

OLD, NEW = "1" * 40, "2" * 40
MULTIJAIL, RELEASE = "prompts/DAMO-NLP-SG_MultiJail", "prompts/SoftMINER-Group_Soteria"
CODE = {"loader.py": b"raise SystemExit('code of a source ran')", "data/model.pkl": b"\x80", "data/run.sh": b"exit 1"}
# By the paths in the output. A folder's stand-in for its source has them, and code.
EXPECTED = {
    "icl/antonym_Hindi.json": b'[{"input": "a", "output": "b"}]',
    "icl/sentiment_Hindi.json": b"[]\r\n",
    "heads/Mistral_5_Dataset/Hindi_Heads.json": b"[[3, 1], [0, 2]]",
    f"{MULTIJAIL}/README.md": b"---\nlicense: mit\n---\n",
    f"{MULTIJAIL}/data/test [1].csv": "hi\nक्या?\n".encode(),
    f"{RELEASE}/XThreatBench/hindi.parquet": bytes(range(256)) * 40,
    f"{RELEASE}/LICENSE": b"MIT",
    f"{SOURCE}/hi/Insult.csv": "हिन्दी\n".encode(),
    f"{SOURCE}/README.md": b"# XSafety",
}


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def part(folder: str) -> dict[str, bytes]:
    """The files of one folder of the output, by their names there."""
    return {name.removeprefix(f"{folder}/"): EXPECTED[name] for name in EXPECTED if name.startswith(f"{folder}/")}


def commit(folder: Path, contents: dict[str, bytes]) -> str:
    """Commit files to a repository, made if there is none, for a server of plain files; gives the commit."""
    if not folder.exists():
        folder.mkdir(parents=True)
        git(folder, "init", "--quiet", "--template=", "--initial-branch=main")
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=files")
    git(folder, "update-server-info")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> tuple[Path, str]:
    """The repositories `release` and `xsafety`, and the wanted commit of the former, which is not its newest."""
    folder = tmp_path_factory.mktemp("repositories")
    places = {"icl": "dataset_files/abstractive", "heads": "src/Multilingual_Codes/Heads"}
    wanted = {f"{places[kind]}/{name}": content for kind in places for name, content in part(kind).items()}
    notebook = {"src/Multilingual_Codes/Heads/Majority.ipynb": b"{}", "dataset_files/abstractive/make.py": b"exit(1)"}
    wanted_commit = commit(folder / "release", wanted | notebook)
    commit(folder / "release", {"dataset_files/abstractive/later_Hindi.json": b"[]"})
    commit(folder / "xsafety", part(SOURCE) | CODE)
    return folder, wanted_commit


@pytest.fixture
def servers(tmp_path, monkeypatch, repositories):
    """All sources on this machine; this process and its children are led to them instead of the real ones."""
    folder, wanted = repositories
    shutil.copytree(folder, tmp_path / "served")
    found = LocalServers(tmp_path / "served")
    found.datasets = {
        "DAMO-NLP-SG/MultiJail": {OLD: part(MULTIJAIL) | CODE},
        "SoftMINER-Group/Soteria": {OLD: part(RELEASE) | CODE},
    }
    monkeypatch.setattr(original, "RELEASE_COMMIT", wanted)
    monkeypatch.setattr(original, "RELEASE_URL", f"{found.url}/files/release/.git")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
    template = f"{found.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, value in {
        "HF_ENDPOINT": found.url,  # for processes that are not forked
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{found.url}/files/xsafety/.git.insteadOf",
        "GIT_CONFIG_VALUE_0": f"https://github.com/{original.XSAFETY}",
    }.items():
        monkeypatch.setenv(name, value)
    yield found
    found.close()


@pytest.fixture
def fetch(tmp_path, run_script, servers):
    """`fetch(*options)`: the command, to `tmp_path / "out"`; gives the exit status."""
    return lambda *options: run_script(fetch_original, "--output", tmp_path / "out", *options)


def files_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def fetched(output: Path) -> dict[str, bytes]:
    """Without the records and what is made of the files."""
    found = files_of(output)
    return {name: found[name] for name in found if "/" in name and not name.startswith(JOINED)}


def test_every_data_file_arrives_with_its_bytes_and_its_sum_and_its_revision(fetch, tmp_path, capsys):
    assert fetch() == 0
    out = tmp_path / "out"
    assert fetched(out) == EXPECTED
    assert (
        "DAMO-NLP-SG/MultiJail: leaving out what is not data: data/model.pkl, data/run.sh, loader.py"
        in capsys.readouterr().err
    )
    sums = [f"{hashlib.sha256(EXPECTED[name]).hexdigest()}  {name}\n" for name in sorted(EXPECTED)]
    assert (out / "SHA256SUMS").read_text() == "".join(sums)
    facts = json.loads((out / "sources.json").read_text())
    assert list(facts) == sorted(facts)
    assert facts["icl"] == {"source": "NeuralSentinel/Soteria", "revision": original.RELEASE_COMMIT, "files": 2}
    newest = git(tmp_path / "served" / "xsafety", "rev-parse", "HEAD")
    revisions = {folder: fact["revision"] for folder, fact in facts.items()}
    assert revisions == {**facts_of_release(), MULTIJAIL: OLD, RELEASE: OLD, SOURCE: newest}
    assert read_heads(out / "heads" / "Mistral_5_Dataset" / "Hindi_Heads.json") == [(3, 1), (0, 2)]


def facts_of_release() -> dict[str, str]:
    return dict.fromkeys(("icl", "heads"), original.RELEASE_COMMIT)


def test_only_what_is_wanted_is_fetched_and_a_second_run_asks_nobody(fetch, servers, tmp_path):
    assert fetch("--only", "heads") == 0
    assert {name.split("/")[0] for name in fetched(tmp_path / "out")} == {"heads"}
    assert fetch() == 0
    assert fetched(tmp_path / "out") == EXPECTED
    asked, written = len(servers.asked), {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert asked and fetch() == 0
    assert len(servers.asked) == asked
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_path_will_do_as_git_url_even_without_a_newest_commit(fetch, servers, tmp_path):
    mirror = tmp_path / "served" / "release"
    git(mirror, "symbolic-ref", "HEAD", "refs/heads/nothing")
    assert fetch("--only", "icl", "--git_url", mirror) == 0
    assert not servers.asked and fetched(tmp_path / "out") == {
        f"icl/{x}": content for x, content in part("icl").items()
    }


# What is broken


def test_a_broken_file_is_named_and_fetched_again_and_no_other_is_touched(fetch, servers, tmp_path, capsys):
    assert fetch() == 0
    out = tmp_path / "out"
    whole = files_of(out)
    broken = [out / name for name in EXPECTED if "antonym" in name or "[1]" in name or "parquet" in name]
    for break_file in (
        lambda path: path.write_bytes(b"x" * path.stat().st_size),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        Path.unlink,
    ):
        for path in broken:
            kept = path.stat()
            break_file(path)
            if path.exists():
                os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # as a broken disk would
        capsys.readouterr()
        servers.asked.clear()
        assert fetch() == 0
        assert files_of(out) == whole
        said = [line for line in capsys.readouterr().err.splitlines() if "fetching it again" in line]
        assert [line.partition(" was" if break_file is not Path.unlink else " is")[0] for line in said] == [
            *map(str, broken)
        ]
        assert not [asked for asked in servers.asked if "xsafety" in asked]
    for record in ("SHA256SUMS", "sources.json"):
        (out / record).write_bytes(whole[record][:70])
        assert fetch() == 0
        assert files_of(out) == whole


# Whom to believe


def test_a_repository_without_the_pinned_commit_is_refused(fetch, servers, tmp_path, capsys):
    address = f"{servers.url}/files/xsafety/.git"
    assert fetch("--only", "icl", "--git_url", address) == 2
    sentence = capsys.readouterr().err
    assert address in sentence and original.RELEASE_COMMIT in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first_use", ["finished", "broken off"])
def test_later_runs_keep_to_the_revision_of_the_first(fetch, servers, tmp_path, monkeypatch, first_use):
    out = tmp_path / "out"
    if first_use == "finished":
        assert fetch("--only", "prompts") == 0
        for name in (MULTIJAIL, SOURCE):
            shutil.rmtree(out / name)
        shutil.rmtree(tmp_path / "cache")
    else:
        with monkeypatch.context() as patch:
            patch.setattr(
                original, "snapshot", lambda source, _: (_ for _ in ()).throw(UserError(f"{source.name} broke"))
            )
            assert fetch("--only", "prompts") == 2
    servers.datasets["DAMO-NLP-SG/MultiJail"][NEW] = {"README.md": b"all else is gone"}
    commit(tmp_path / "served" / "xsafety", {"hi/Insult.csv": b"newer"})
    assert fetch("--only", "prompts") == 0
    assert fetched(out) == {name: content for name, content in EXPECTED.items() if name.startswith("prompts")}


def test_other_bytes_under_the_same_revision_are_refused_and_not_kept(fetch, servers, tmp_path, capsys):
    assert fetch("--only", "prompts") == 0
    whole = files_of(tmp_path / "out")
    servers.datasets["SoftMINER-Group/Soteria"][OLD] = part(RELEASE) | {"LICENSE": b"none"}
    (tmp_path / "out" / RELEASE / "LICENSE").unlink()
    shutil.rmtree(tmp_path / "cache")
    assert fetch("--only", "prompts") == 2
    said = capsys.readouterr().err
    assert f"SoftMINER-Group/Soteria sent other bytes for {RELEASE}/LICENSE" in said and "SHA256SUMS" in said
    del whole[f"{RELEASE}/LICENSE"]
    assert files_of(tmp_path / "out") == whole


def test_bytes_that_are_not_those_listed_are_refused_on_first_use(fetch, servers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(servers, "sends", lambda content: content[::-1])
    assert fetch("--only", "prompts") == 2
    assert "DAMO-NLP-SG/MultiJail sent other bytes for README.md" in capsys.readouterr().err
    assert not [name for name in fetched(tmp_path / "out") if name.startswith((MULTIJAIL, RELEASE))]


def test_a_name_that_leads_out_of_the_folder_is_refused():
    for name in ("../SHA256SUMS", "/etc/passwd", "a/../../b", "a\nb", "a\\b"):
        with pytest.raises(UserError, match="lab/data has a file named"):
            original._safe(name, "lab/data")


# Servers that fail


def test_without_a_network_each_source_gets_one_sentence_and_nothing_is_left(fetch, servers, tmp_path, capsys):
    servers.close()
    started = time.monotonic()
    assert fetch() == 2
    assert time.monotonic() - started < 10
    sentences = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in sentences)
    assert ["check the network" in line for line in sentences] == [True, True, True, True, False]
    assert "4 of 4 sources" in sentences[-1]
    assert not (tmp_path / "out").exists()


def test_a_server_that_never_answers_is_given_up_in_time(fetch, servers, monkeypatch, capsys):
    monkeypatch.setattr(original, "PATIENCE", 0.3)
    sources = original.sources(f"{servers.url}/files/release/.git")
    for source in sources[:2]:  # git and the hub
        monkeypatch.setattr(original, "sources", lambda _, source=source: [source])
        servers.hold = len(servers.asked) + 1
        assert fetch() == 2
        assert "could not be fetched" in capsys.readouterr().err


def test_one_source_out_of_reach_does_not_keep_the_others(fetch, servers, tmp_path, capsys):
    del servers.datasets["DAMO-NLP-SG/MultiJail"]
    assert fetch("--git_url", "http://127.0.0.1:9/x") == 2
    arrived = {name: content for name, content in EXPECTED.items() if name.startswith((RELEASE, SOURCE))}
    assert fetched(tmp_path / "out") == arrived
    sentences = capsys.readouterr().err
    assert "error: DAMO-NLP-SG/MultiJail on" in sentences and "error: http://127.0.0.1:9/x" in sentences
    assert "2 of 4 sources" in sentences


def test_without_git_a_sentence_says_so(fetch, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert fetch("--only", "icl") == 2
    assert "git is needed" in capsys.readouterr().err


def test_no_password_of_an_address_is_shown_or_written(fetch, servers, tmp_path, capsys):
    secret = servers.url.replace("http://", "http://me:hunter2@")
    assert fetch("--only", "icl", "--git_url", f"{secret}/files/nothing") == 2
    assert fetch("--only", "icl", "--git_url", f"{secret}/files/release/.git") == 0
    shown = capsys.readouterr()
    for address in ("https://hunter2@127.0.0.1:9/x", "https://me:p@hunter2@127.0.0.1:9/x", "hunter2@127.0.0.1:/x?t=1"):
        assert fetch("--only", "icl", "--git_url", address, "--output", tmp_path / "none") == 2
    for end in ("?token=hunter2", "#hunter2"):
        address = f"{servers.url}/files/no{end}"
        assert fetch("--only", "icl", "--git_url", address, "--output", tmp_path / "none") == 2
    later = capsys.readouterr()
    assert "hunter2" not in shown.out + shown.err + later.out + later.err
    assert not [name for name, content in files_of(tmp_path / "out").items() if b"hunter2" in content]


@pytest.mark.parametrize("address", ["", "a\nb", "nowhere"])
def test_the_only_source_is_refused_in_one_sentence(address, fetch, servers, tmp_path, capsys):
    """An empty address is not that of the hub, where anybody may have a data set of the repository's name."""
    asked = len(servers.asked)
    assert fetch("--only", "icl", "--git_url", address, "--output", tmp_path / "none") == 2
    refused = capsys.readouterr().err
    assert refused.startswith("error: ") and refused.count("\n") == 1
    assert len(servers.asked) == asked and not (tmp_path / "none").exists()


# Killed and interrupted


def test_a_run_killed_at_any_request_resumes_and_ends_with_the_same_bytes(fetch, servers, tmp_path, monkeypatch):
    assert fetch() == 0
    whole, requests = files_of(tmp_path / "out"), len(servers.asked)

    def kill_when_held(child):
        while child.is_alive() and not servers.held.wait(0.01):
            pass

    for number in range(2, requests + 1, 9):
        out = tmp_path / str(number)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / f"cache_{number}"))
        servers.asked.clear()
        servers.held.clear()
        servers.go.clear()
        servers.hold = number
        run_in_child(fetch_original, ["--output", str(out)], kill_when=kill_when_held)
        assert servers.held.is_set()
        servers.hold = 0
        servers.go.set()
        run_in_child(fetch_original, ["--output", str(out)])
        assert files_of(out) == whole


def test_ctrl_c_ends_it_with_130_and_the_same_command_resumes(servers, tmp_path):
    command = [sys.executable, ROOT / "src" / "fetch_original.py", "--only", "prompts", "--output", tmp_path / "out"]
    servers.hold = 5
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background jobs ignore Ctrl-C, and so would what they start.
    child = subprocess.Popen(
        command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **pipes
    )
    assert servers.held.wait(30)
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    servers.go.set()
    _, said = child.communicate(timeout=20)
    assert child.returncode == 130 and "Traceback" not in said
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert fetched(tmp_path / "out") == {name: EXPECTED[name] for name in EXPECTED if name.startswith("prompts")}


# XSafety


def test_a_languages_categories_become_one_file_that_questions_are_read_from(tmp_path):
    files = {
        "en/Insult_n.csv": "One, two?\nThree?\n",
        "en/Mental_Health_en.csv": '"Said ""no"", then?"\n\n',
        "sp/Insult.csv": "\ufeff¿Uno?\n",
        "ja/Insult.csv": "一？\n",  # not one of the paper's languages
    }
    for name, text in files.items():
        path = tmp_path / SOURCE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert join_xsafety(tmp_path) == 2
    assert sorted(path.name for path in (tmp_path / JOINED).iterdir()) == ["English.csv", "Spanish.csv"]
    english = read_questions(str(tmp_path / JOINED / "English.csv"), find_language("en"))
    assert english.questions == ["One, two?", "Three?", 'Said "no", then?']
    assert english.categories == ["Insult", "Insult", "Mental_Health"]
    spanish = read_questions(str(tmp_path / JOINED / "Spanish.csv"), find_language("es"))
    assert spanish.questions == ["¿Uno?"]


def test_a_workbook_is_read_and_a_category_spelled_in_two_ways_counts_once(tmp_path, capsys):
    folder = tmp_path / SOURCE
    (folder / "bn").mkdir(parents=True)
    (folder / "hi").mkdir()
    for name, texts in {"Insult_n": ["এক, দুই?", "", "তিন?"], "Mental_Health_n": ["007", "NA"]}.items():
        pd.DataFrame({0: texts}).to_excel(folder / "bn" / f"{name}.xlsx", header=False, index=False)
    (folder / "bn" / "commonsense.csv").write_text("চার?\n", encoding="utf-8")
    (folder / "hi" / "commen_sense.csv").write_text("एक\n", encoding="utf-8")
    (folder / "hi" / "commonsense.csv").write_text("एक, क्यों?\n", encoding="utf-8")
    assert join_xsafety(tmp_path) == 2
    bengali = read_questions(str(tmp_path / JOINED / "Bengali.csv"), find_language("bn"))
    assert bengali.questions == ["এক, দুই?", "তিন?", "007", "NA", "চার?"]
    assert bengali.categories == ["Insult", "Insult", "Mental_Health", "Mental_Health", "commonsense"]
    hindi = read_questions(str(tmp_path / JOINED / "Hindi.csv"), find_language("hi"))
    assert (hindi.questions, hindi.categories) == (["एक, क्यों?"], ["commonsense"])
    said = capsys.readouterr().err
    assert "commen_sense.csv left out" in said and "Hindi lacks Insult, Mental_Health" in said


def test_without_the_repository_nothing_is_written(tmp_path):
    assert join_xsafety(tmp_path) == 0 and not list(tmp_path.iterdir())
