"""The authors' original inputs, from a git server and a hub on loopback: whole, checked, and only once."""

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
import pytest
from conftest import ROOT, run_in_child
from local_servers import LocalServers

import compute_indirect_effect
import fetch_original
from soteria.scoring.heads import read_heads
from soteria.scoring.prompts import load_pairs
from soteria.storage import files, original, paths
from soteria.storage.xsafety import JOINED

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="no git here, which the original's files come by")

OLD, NEW = "1" * 40, "2" * 40
ICL = {f"{task}_Hindi.json" for task in ("antonym", "sentiment")}
MULTIJAIL, RELEASE = "prompts/DAMO-NLP-SG_MultiJail", "prompts/SoftMINER-Group_Soteria"
XSAFETY = "prompts/Jarviswang94_Multilingual_safety_benchmark"


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def commit_files(folder: Path, contents: dict[str, bytes]) -> str:
    """Commit files to a repository, which is made where there is none; gives the commit."""
    if not folder.exists():
        folder.mkdir(parents=True)
        git(folder, "init", "--quiet", "--template=", "--initial-branch=main")
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=files")
    return git(folder, "rev-parse", "HEAD")


def release_files() -> dict[str, bytes]:
    """What stands in for the authors' repository, by its paths there."""
    heads = {f"{folder}_5_Dataset/Hindi_Heads.json": b"[[3, 1], [0, 2]]" for folder in ("Mistral", "llama3_1")}
    return {
        **{f"dataset_files/abstractive/{name}": (paths.DATA / "icl" / name).read_bytes() for name in ICL},
        **{f"src/Multilingual_Codes/Heads/{name}": content for name, content in heads.items()},
        "src/Multilingual_Codes/Heads/Heads_Majority.ipynb": b"{}",
        "dataset_files/abstractive/make.py": b"raise SystemExit('code of the original ran')",
        "readme.md": b"# Soteria",
    }


def expected() -> dict[str, bytes]:
    """All files that are to come, by their paths in the output."""
    placed = {}
    for name, content in release_files().items():
        if name.endswith(".json"):
            inside = name.removeprefix("dataset_files/abstractive/").removeprefix("src/Multilingual_Codes/Heads/")
            placed[f"{'icl' if name.startswith('dataset') else 'heads'}/{inside}"] = content
    placed |= {f"{MULTIJAIL}/{name}": content for name, content in MULTIJAIL_FILES.items()}
    placed |= {f"{RELEASE}/{name}": content for name, content in RELEASE_FILES.items()}
    return placed | {f"{XSAFETY}/{name}": content for name, content in XSAFETY_FILES.items()}


MULTIJAIL_FILES = {"README.md": b"---\nlicense: mit\n---\n", "data/test [1].csv": "hi\nक्या?\n".encode()}
RELEASE_FILES = {"XThreatBench/hindi.parquet": bytes(range(256)) * 40, "LICENSE": b"MIT"}
XSAFETY_FILES = {"hi/Insult.csv": "हिन्दी\n".encode(), "README.md": b"# XSafety"}
CODE = {"loader.py": b"raise SystemExit('code of a dataset ran')", "data/run.sh": b"exit 1"}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> tuple[Path, str]:
    """A folder with the repositories, `made/<name>` and what is served of them, and the commit that is wanted."""
    folder = tmp_path_factory.mktemp("repositories")
    wanted = commit_files(folder / "made" / "release", release_files())
    commit_files(folder / "made" / "release", {"dataset_files/abstractive/later_Hindi.json": b"[]"})
    commit_files(folder / "made" / "xsafety", XSAFETY_FILES | CODE)
    for name in ("release", "xsafety"):
        serve(folder, name)
    return folder, wanted


@pytest.fixture
def servers(tmp_path, monkeypatch, repositories):
    """Both servers with all sources, and this process and its children led to them instead of the true ones."""
    folder, wanted = repositories
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    found = LocalServers(tmp_path / "served")
    monkeypatch.setattr(original, "RELEASE_COMMIT", wanted)
    found.datasets = {
        "DAMO-NLP-SG/MultiJail": {OLD: MULTIJAIL_FILES | CODE},
        "SoftMINER-Group/Soteria": {OLD: RELEASE_FILES | CODE},
    }
    monkeypatch.setattr(original, "RELEASE_URL", f"{found.url}/git/release")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
    template = f"{found.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_ENDPOINT", found.url)  # for processes that are not forked
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{found.url}/git/xsafety.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/Jarviswang94/Multilingual_safety_benchmark")
    yield found
    found.close()


def serve(tmp_path: Path, name: str) -> None:
    """Put a repository where the git server looks, with what the server of mere files needs."""
    (tmp_path / "served").mkdir(exist_ok=True)
    made, served = str(tmp_path / "made" / name), str(tmp_path / "served" / name)
    git(tmp_path, "clone", "--quiet", "--bare", "--template=", made, served)
    git(tmp_path / "served" / name, "update-server-info")


@pytest.fixture
def fetch(tmp_path, run_script, servers):
    """`fetch(*options)`: the command, to `tmp_path / "out"`; gives the exit status."""
    return lambda *options: run_script(fetch_original, "--output", tmp_path / "out", *options)


def arrived(output: Path) -> dict[str, bytes]:
    """All files but the bookkeeping of git and of the hub's client, which holds the time of day."""
    kept = {path.relative_to(output): path for path in output.rglob("*") if path.is_file()}
    hidden = {name for name in kept if {".repositories", ".cache"} & set(name.parts)}
    assert not [name for name in kept if name.suffix in (".tmp", ".incomplete")]
    return {str(name): path.read_bytes() for name, path in kept.items() if name not in hidden}


def without_records(contents: dict[str, bytes]) -> dict[str, bytes]:
    """What came, without what is made of it."""
    made = ("SHA256SUMS", "sources.json", *(name for name in contents if name.startswith(JOINED)))
    return {name: content for name, content in contents.items() if name not in made}


# --- what comes ------------------------------------------------------------------------------------------------------


def test_everything_arrives_with_the_right_bytes_and_no_code(fetch, tmp_path, capsys):
    assert fetch() == 0
    assert without_records(arrived(tmp_path / "out")) == expected()
    assert "DAMO-NLP-SG/MultiJail: left out, being no data: data/run.sh, loader.py" in capsys.readouterr().err


def test_the_sums_are_sorted_and_hold_by_sha256sum(fetch, tmp_path):
    assert fetch() == 0
    lines = (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()
    assert [line[66:] for line in lines] == sorted(expected())
    assert all(hashlib.sha256(expected()[line[66:]]).hexdigest() == line[:64] for line in lines)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path / "out", check=True)


def test_the_revisions_that_came_are_written_down(fetch, tmp_path):
    assert fetch() == 0
    facts = json.loads((tmp_path / "out" / "sources.json").read_text())
    newest = git(tmp_path / "made" / "xsafety", "rev-parse", "HEAD")
    revisions = {folder: fact["revision"] for folder, fact in facts.items()}
    release = dict.fromkeys(("icl", "heads"), original.RELEASE_COMMIT)
    assert revisions == {**release, MULTIJAIL: OLD, RELEASE: OLD, XSAFETY: newest}


def test_a_second_run_asks_nobody_and_writes_nothing(fetch, servers, tmp_path):
    assert fetch() == 0
    asked, written = len(servers.asked), {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert asked and fetch() == 0
    assert len(servers.asked) == asked
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_only_what_is_wanted_comes_and_the_rest_can_follow(fetch, servers, tmp_path):
    assert fetch("--only", "heads") == 0
    assert {name.split("/")[0] for name in without_records(arrived(tmp_path / "out"))} == {"heads"}
    asked = len(servers.asked)
    assert fetch("--only", "icl") == 0
    assert len(servers.asked) == asked  # from the git objects that are here
    assert fetch() == 0
    assert without_records(arrived(tmp_path / "out")) == expected()


def test_a_server_of_mere_files_which_gives_no_single_commits_will_do(fetch, servers, tmp_path):
    assert fetch("--only", "icl", "heads", "--git_url", f"{servers.url}/dumb/release") == 0
    came = without_records(arrived(tmp_path / "out"))
    assert came == {name: content for name, content in expected().items() if not name.startswith("prompts")}


def test_a_mirror_whose_head_is_no_branch_will_do(fetch, servers, tmp_path):
    git(tmp_path / "served" / "release", "symbolic-ref", "HEAD", "refs/heads/nothing")
    assert fetch("--only", "icl") == 0


def test_a_path_will_do_as_git_url(fetch, tmp_path):
    assert fetch("--only", "icl", "--git_url", tmp_path / "made" / "release") == 0
    assert {name for name in arrived(tmp_path / "out") if "/" in name} == {f"icl/{name}" for name in ICL}


def test_step_1_reads_the_original_word_lists_and_heads(fetch, tmp_path, run_script, tiny_folder):
    assert fetch("--only", "icl", "heads") == 0
    icl, model = tmp_path / "out" / "icl", tiny_folder("llama")
    assert load_pairs(icl / "antonym_Hindi.json") == load_pairs(paths.DATA / "icl" / "antonym_Hindi.json")
    options = ("--n_shots", 2, "--n_trials", 1, "--save_path_root", tmp_path / "effect", "--device", "cpu")
    arguments = ("--dataset_name", "*_Hindi", "--root_data_dir", icl, "--model_name", model, *options)
    assert run_script(compute_indirect_effect, *arguments) == 0
    assert {path.name for path in (tmp_path / "effect").iterdir()} == {Path(name).stem for name in ICL}
    assert read_heads(tmp_path / "out" / "heads" / "Mistral_5_Dataset" / "Hindi_Heads.json") == [(3, 1), (0, 2)]


# --- what is broken --------------------------------------------------------------------------------------------------


BREAK = {
    "changed": lambda path: path.write_bytes(b"x" * path.stat().st_size),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_broken_file_is_named_and_mended_and_no_other_is_fetched(fetch, servers, tmp_path, how, capsys):
    assert fetch() == 0
    whole = arrived(tmp_path / "out")
    broken = ["icl/antonym_Hindi.json", f"{MULTIJAIL}/data/test [1].csv", f"{XSAFETY}/hi/Insult.csv"]
    broken.append(f"{RELEASE}/XThreatBench/hindi.parquet")
    for name in broken:
        path = tmp_path / "out" / name
        kept = path.stat()
        BREAK[how](path)
        if path.exists():
            os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # as a broken disk would
    capsys.readouterr()
    servers.asked.clear()
    assert fetch() == 0
    assert arrived(tmp_path / "out") == whole
    said = capsys.readouterr().err
    assert all(f"{tmp_path / 'out' / name} {'is gone' if how == 'gone' else 'was changed'}" in said for name in broken)
    assert not [asked for asked in servers.asked if "/git/" in asked]
    sent = {asked.rsplit("/", 1)[1] for asked in servers.asked if asked.startswith("GET") and "/resolve/" in asked}
    assert sent == {"test%20%5B1%5D.csv", "hindi.parquet"}


def test_rotten_git_objects_are_fetched_anew(fetch, servers, tmp_path):
    assert fetch("--only", "icl") == 0
    whole = arrived(tmp_path / "out")
    objects = tmp_path / "out" / ".repositories" / "NeuralSentinel_Soteria.git" / "objects"
    rotten = max((path for path in objects.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    rotten.chmod(0o644)
    content = bytearray(rotten.read_bytes())
    content[len(content) // 2] ^= 1
    rotten.write_bytes(content)
    shutil.rmtree(tmp_path / "out" / "icl")
    assert fetch("--only", "icl") == 0
    assert arrived(tmp_path / "out") == whole


@pytest.mark.parametrize("record", ["SHA256SUMS", "sources.json"])
def test_a_broken_record_is_made_anew(fetch, tmp_path, record):
    assert fetch() == 0
    whole = arrived(tmp_path / "out")
    (tmp_path / "out" / record).write_bytes(whole[record][:70])
    assert fetch() == 0
    assert arrived(tmp_path / "out") == whole


# --- whom to believe -------------------------------------------------------------------------------------------------


def test_a_repository_without_the_pinned_commit_is_refused(fetch, servers, tmp_path, capsys):
    assert fetch("--only", "icl", "--git_url", f"{servers.url}/git/xsafety") == 2
    sentence = capsys.readouterr().err
    assert f"{servers.url}/git/xsafety has no sound commit {original.RELEASE_COMMIT}" in sentence
    assert not (tmp_path / "out").exists()


def test_later_runs_keep_to_the_revision_of_the_first(fetch, servers, tmp_path):
    assert fetch("--only", "prompts") == 0
    whole = arrived(tmp_path / "out")
    servers.datasets["DAMO-NLP-SG/MultiJail"][NEW] = {"README.md": b"all else is gone"}
    commit_files(tmp_path / "made" / "xsafety", {"hi/Insult.csv": b"newer"})
    shutil.rmtree(tmp_path / "served" / "xsafety")
    serve(tmp_path, "xsafety")
    for name in (".repositories", MULTIJAIL, XSAFETY):
        shutil.rmtree(tmp_path / "out" / name)
    assert fetch("--only", "prompts") == 0
    assert arrived(tmp_path / "out") == whole


def test_a_first_use_that_was_broken_off_goes_on_with_its_revision(fetch, servers, tmp_path, monkeypatch):
    def break_off(*_, **__):
        raise original.UserError("broken off")

    with monkeypatch.context() as patch:
        patch.setattr(original.Repository, "fetch", break_off)
        patch.setattr(huggingface_hub, "snapshot_download", break_off)
        assert fetch("--only", "prompts") == 2
    servers.datasets["DAMO-NLP-SG/MultiJail"][NEW] = {"README.md": b"all else is gone"}
    commit_files(tmp_path / "made" / "xsafety", {"hi/Insult.csv": b"newer"})
    shutil.rmtree(tmp_path / "served" / "xsafety")
    serve(tmp_path, "xsafety")
    assert fetch("--only", "prompts") == 0
    came = without_records(arrived(tmp_path / "out"))
    assert came == {name: content for name, content in expected().items() if name.startswith("prompts")}


def test_other_bytes_under_the_same_revision_are_refused_and_not_kept(fetch, servers, tmp_path, capsys):
    assert fetch("--only", "prompts") == 0
    whole = arrived(tmp_path / "out")
    servers.datasets["SoftMINER-Group/Soteria"][OLD] = RELEASE_FILES | {
        "LICENSE": b"none"
    }  # its checksum in the list too
    (tmp_path / "out" / RELEASE / "LICENSE").unlink()
    assert fetch("--only", "prompts") == 2
    assert "SoftMINER-Group/Soteria sent other bytes for LICENSE" in capsys.readouterr().err
    del whole[f"{RELEASE}/LICENSE"]
    assert arrived(tmp_path / "out") == whole


def test_bytes_that_are_not_those_listed_are_refused_on_first_use(fetch, servers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(servers, "sends", lambda file, content: content[::-1])
    assert fetch("--only", "prompts") == 2
    assert "DAMO-NLP-SG/MultiJail sent other bytes for README.md" in capsys.readouterr().err
    assert not [name for name in arrived(tmp_path / "out") if name.startswith((MULTIJAIL, RELEASE))]
    monkeypatch.undo()


def test_a_name_that_leads_out_of_the_folder_is_refused():
    for name in ("../SHA256SUMS", "/etc/passwd", "a/../../b", "a\nb", "a\\b"):
        with pytest.raises(original.UserError, match="which is not written"):
            original._check_name(name, "lab/data")


# --- no network ------------------------------------------------------------------------------------------------------


def test_without_a_network_each_source_gets_a_sentence_and_nothing_is_left(fetch, servers, tmp_path, capsys):
    servers.close()
    started = time.monotonic()
    assert fetch() == 2
    assert time.monotonic() - started < 10
    sentences = capsys.readouterr().err.splitlines()
    assert len(sentences) == 5
    assert all(line.startswith("error: ") for line in sentences)
    assert sum("could not be reached" in line and "check the network" in line for line in sentences) == 4
    assert "4 of 4 sources did not come" in sentences[-1]
    assert not (tmp_path / "out").exists()


def test_a_server_that_never_answers_is_given_up_in_time(fetch, servers, monkeypatch, capsys):
    monkeypatch.setattr(original, "PATIENCE", 0.3)
    servers.hold = 1
    assert fetch("--only", "icl") == 2
    assert "could not be reached (no answer in 0.3 s)" in capsys.readouterr().err
    servers.hold = len(servers.asked) + 1
    monkeypatch.setattr(original, "sources", lambda _: [original.HubSource("DAMO-NLP-SG/MultiJail")])
    assert fetch("--only", "prompts") == 2
    assert "could not be reached (" in capsys.readouterr().err


def test_without_git_a_sentence_says_so(fetch, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert fetch("--only", "icl") == 2
    assert "git is needed" in capsys.readouterr().err


def test_one_source_out_of_reach_does_not_keep_the_others(fetch, servers, tmp_path, capsys):
    del servers.datasets["DAMO-NLP-SG/MultiJail"]
    assert fetch("--git_url", "http://127.0.0.1:9/x") == 2
    came = without_records(arrived(tmp_path / "out"))
    assert came == {name: content for name, content in expected().items() if name.startswith((RELEASE, XSAFETY))}
    sentences = capsys.readouterr().err
    assert "DAMO-NLP-SG/MultiJail on" in sentences and "does not exist, or is private" in sentences
    assert "2 of 4 sources did not come" in sentences


def test_no_password_of_an_address_is_shown_or_written(fetch, servers, tmp_path, capsys):
    secret = servers.url.replace("http://", "http://me:hunter2@")
    assert fetch("--only", "icl", "--git_url", f"{secret}/git/nothing") == 2
    assert fetch("--only", "icl", "--git_url", f"{secret}/git/release") == 0
    shown = capsys.readouterr()
    assert "hunter2" not in shown.out + shown.err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]


# --- killed and interrupted ------------------------------------------------------------------------------------------


def test_a_run_killed_at_any_request_goes_on_and_ends_with_the_same_bytes(fetch, servers, tmp_path):
    assert fetch() == 0
    whole, requests = arrived(tmp_path / "out"), len(servers.asked)
    assert requests > 12

    def kill_when_held(child):
        while child.is_alive() and not servers.held.wait(0.01):
            pass

    for number in range(1, requests + 1, 3):
        out = tmp_path / str(number)
        servers.asked.clear()
        servers.held.clear()
        servers.go.clear()
        servers.hold = number
        run_in_child(fetch_original, ["--output", str(out)], kill_when=kill_when_held)
        assert servers.held.is_set()
        servers.hold = 0
        servers.go.set()
        run_in_child(fetch_original, ["--output", str(out)])
        assert arrived(out) == whole


def test_a_run_killed_while_it_writes_goes_on_without_the_network(fetch, servers, tmp_path, monkeypatch):
    assert fetch("--only", "icl", "heads") == 0
    whole, asked = arrived(tmp_path / "out"), len(servers.asked)
    (tmp_path / "out" / "SHA256SUMS").unlink()
    write, out = files.whole_file, tmp_path / "out"

    def write_slowly(path):
        time.sleep(0.1)
        return write(path)

    for folder in ("icl", "heads"):
        shutil.rmtree(out / folder)
    for there in range(1, 4):
        with monkeypatch.context() as patch:
            patch.setattr(files, "whole_file", write_slowly)

            def kill_when_written(child, there=there):
                while child.is_alive() and len(list(out.glob("icl/*.json")) + list(out.glob("heads/*/*.json"))) < there:
                    time.sleep(0.005)

            run_in_child(fetch_original, ["--output", str(out), "--only", "icl", "heads"], kill_when=kill_when_written)
        assert arrived(out) != whole
    assert fetch("--only", "icl", "heads") == 0
    assert arrived(out) == whole
    assert len(servers.asked) == asked


@pytest.mark.parametrize("wanted", ["/git/", "/resolve/"])
def test_ctrl_c_ends_it_with_130_and_as_a_user_calls_it_it_goes_on(servers, tmp_path, wanted):
    command = [sys.executable, ROOT / "src" / "fetch_original.py", "--only", "prompts", "--output", tmp_path / "out"]
    whole = subprocess.run([*command[:-1], tmp_path / "whole"], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    servers.hold = 1 + next(i for i, asked in enumerate(servers.asked) if wanted in asked)
    servers.asked.clear()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert servers.held.wait(20)
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    servers.hold = 0
    servers.go.set()
    _, said = child.communicate(timeout=20)
    assert child.returncode == 130
    assert said.splitlines()[-1] == "interrupted; the same command goes on from here"
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert arrived(tmp_path / "out") == arrived(tmp_path / "whole")
