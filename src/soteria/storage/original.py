"""Fetch the authors' original inputs with git and huggingface_hub into an output folder, and check them.

Out: the files, `SHA256SUMS` (for `sha256sum -c`), `sources.json` (per folder: source, revision and, once complete, the
number of files), and XSafety joined into one question file per language.
"""

import csv
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm
from typing_extensions import TypedDict

from soteria import disk
from soteria.errors import UserError
from soteria.languages import PAPER_LANGUAGES
from soteria.storage import files, outputs
from soteria.storage.csv_files import CsvFile, has_return, write_rows
from soteria.storage.side_files import Text, fits, side_file

RELEASE_URL = "https://github.com/NeuralSentinel/Soteria"
RELEASE_COMMIT = "9d9818283a1e54d48db9fbdb89eb6bfbefa510ef"
XSAFETY = "Jarviswang94/Multilingual_safety_benchmark"
XSAFETY_FOLDER, JOINED = f"prompts/{XSAFETY.replace('/', '_')}", "prompts/XSafety"
MISSPELLED = {"commen_sense": "commonsense", "Crimes_And_Illegal_Activitie": "Crimes_And_Illegal_Activities"}
# Data, READMEs and licenses; no code, no pickles.
ENDINGS = ("csv", "tsv", "json", "jsonl", "parquet", "txt", "xlsx", "md")
DATA_FILES = rf"(.*\.(?:{'|'.join(ENDINGS)})|(?:.*/)?LICEN[CS]E)"
KINDS = ("icl", "heads", "prompts")  # the folders of the output
PATIENCE = 10.0  # seconds to wait for a server's first answer


@dataclass(frozen=True)
class Source:
    """A git repository or, without a `url`, a dataset on the Hugging Face hub.

    `folders`: folder of the output -> pattern of its files' paths in the source; group 1 is the name in the folder.
    Without a `commit`, the first use takes the newest revision, and later uses keep to it.
    """

    name: str
    folders: dict[str, str]
    url: str | None = None
    commit: str | None = None


@side_file
class SourceFact(TypedDict, total=False):
    """What sources.json says of a folder."""

    source: Text
    revision: Text | None
    files: int


def sources(git_url: str = RELEASE_URL) -> list[Source]:
    """Where the original inputs come from; `git_url` is the address of the authors' repository."""
    release = {
        "icl": r"dataset_files/abstractive/([^/]+\.json)",
        "heads": r"src/Multilingual_Codes/Heads/([^/]+/[^/]+\.json)",
    }
    found = [Source("NeuralSentinel/Soteria", release, git_url, RELEASE_COMMIT)]
    for name in ("DAMO-NLP-SG/MultiJail", "SoftMINER-Group/Soteria", XSAFETY):  # the second has XThreatBench
        url = f"https://github.com/{name}" if name == XSAFETY else None
        found.append(Source(name, {f"prompts/{name.replace('/', '_')}": DATA_FILES}, url))
    return found


def check_output(output: Path) -> None:
    """Raise UserError for a folder that has other files under the names of the two records, or links there."""
    is_ours = any(name.startswith(KINDS) for name in (*_sums(output), *files.read_facts(output / "sources.json")))
    for name in ("SHA256SUMS", "sources.json"):
        outputs.check_file(output / name, is_ours)


def fetch(source: Source, folders: list[str], output: Path) -> None:
    """Fetch the files of a source's folders that are missing or changed, each whole or not at all.

    Raises UserError if the source is needed and cannot be reached, or sends other bytes than at the first use, and for
    a file of the user's in the place of one.
    """
    revision = source.commit or recorded(output, folders[0]).get("revision")
    pending = [folder for folder in folders if not _is_sound(output, folder, revision)]
    if not pending:
        return
    latest = newest(source)  # gives up on a server that does not answer
    if not revision:
        if not latest:
            raise UserError(f"{source.name} is empty; check the mirror's address")
        revision = latest
        for folder in pending:  # an interrupted first use resumes with this revision
            _record(output, folder, {"source": source.name, "revision": revision}, {})
    print(f"fetching {source.name}", file=sys.stderr)
    with snapshot(source, revision) as (paths, read):
        for folder in pending:
            wanted = [match for path in paths if (match := re.fullmatch(source.folders[folder], path, re.DOTALL))]
            if not wanted:
                raise UserError(f"{source.name} has no files for {folder} at {revision}; check the mirror's address")
            known, sums = {} if source.commit else _sums(output), {}
            for match in tqdm(wanted, desc=folder, unit="file", disable=None):
                content, name = read(match[0]), f"{folder}/{_safe(match[1], source.name)}"
                sums[name] = _sha256(content)
                if known.get(name, sums[name]) != sums[name]:
                    raise UserError(
                        f"{source.name} sent other bytes for {name} than at the first use, so they were not kept; if "
                        f"the sum in {output}/SHA256SUMS is wrong, remove its line"
                    )
                is_left = (output / name).is_file() and (output / name).read_bytes() == content  # by a killed run
                outputs.check_file(output / name, is_left or name in _sums(output))
                with files.whole_file(output / name) as sibling:
                    sibling.write_bytes(content)
            _record(output, folder, {"source": source.name, "revision": revision, "files": len(sums)}, sums)


def _safe(name: str, source: str) -> str:
    """The name itself. Raises UserError if it leads out of its folder or cannot be written to SHA256SUMS."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable():
        raise UserError(f"{source} has a file named {name!r}, which is not safe to write; ask its owner to rename it")
    return name


def recorded(output: Path, folder: str) -> dict:
    """`source`, `revision` and `files` of a folder, as far as sources.json has them."""
    fact = files.read_facts(output / "sources.json").get(folder)
    return fact if fits(fact, SourceFact) else {}


def _sums(output: Path) -> dict[str, str]:
    """The sha256 in SHA256SUMS by path below `output`."""
    path = output / "SHA256SUMS"
    text = disk.regular_file(path).read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (.+)\n", text, re.MULTILINE)}


def _record(output: Path, folder: str, fact: dict, sums: dict[str, str]) -> None:
    """Replace what sources.json and SHA256SUMS have on a folder."""
    kept = {name: digest for name, digest in _sums(output).items() if not name.startswith(f"{folder}/")}
    lines = [f"{digest}  {name}\n" for name, digest in sorted((kept | sums).items())]
    files.write_text(output / "SHA256SUMS", "".join(lines))
    facts = files.read_facts(output / "sources.json") | {folder: fact}
    files.write_json(output / "sources.json", dict(sorted(facts.items())))


def _is_sound(output: Path, folder: str, revision: str | None) -> bool:
    """Whether all files of a revision are there with the recorded bytes. Prints the names of those that are not."""
    sums = {output / name: digest for name, digest in _sums(output).items() if name.startswith(f"{folder}/")}
    fact = recorded(output, folder)
    if not sums or (fact.get("files"), fact.get("revision")) != (len(sums), revision):
        return False
    broken = [path for path, digest in sums.items() if not path.is_file() or _sha256(path.read_bytes()) != digest]
    for path in broken:
        print(f"{path} {'was changed' if path.exists() else 'is missing'}; fetching it again", file=sys.stderr)
    return not broken


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def newest(source: Source) -> str:
    """The newest revision of a source, empty for an empty mirror. Raises UserError if no answer comes in time."""
    if source.url:
        return _git(source, "ls-remote", "--", source.url, "HEAD", timeout=PATIENCE).decode().partition("\t")[0]
    from huggingface_hub import HfApi

    with _explained(source):
        info = HfApi().dataset_info(source.name, timeout=PATIENCE)
    others = sorted(path for each in info.siblings or [] if not re.fullmatch(DATA_FILES, path := each.rfilename))
    if others:
        print(f"{source.name}: leaving out what is not data: {', '.join(others)}", file=sys.stderr)
    return info.sha


@contextmanager
def snapshot(source: Source, revision: str) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """The paths of a revision's files and a function that reads one, while the block runs."""
    if not source.url:
        from huggingface_hub import snapshot_download

        patterns = [*(f"*.{ending}" for ending in ENDINGS), "*LICEN[CS]E"]
        with _explained(source):
            options = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
            root = Path(snapshot_download(source.name, **options))

        def read(path: str) -> bytes:
            # The client checks only sizes; in its cache a file is named by the listed sha256 or git id.
            content, listed = (root / path).read_bytes(), (root / path).resolve()
            git_id = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
            if re.fullmatch(r"\w{40}|\w{64}", listed.name) and listed.name not in (git_id, _sha256(content)):
                raise UserError(f"{source.name} sent other bytes for {path} than it lists; remove {listed} and rerun")
            return content

        yield sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()), read
        return
    with tempfile.TemporaryDirectory(prefix="soteria-") as clone:
        _git(source, "init", "--bare", "--quiet", "--template=", "--object-format=sha1", clone)
        fetch = ("--git-dir", clone, "fetch", "--quiet")
        try:
            _git(source, *fetch, "--depth=1", "--", source.url, revision)
        except UserError:  # not every server can send a single commit
            _git(source, *fetch, "--", source.url, "+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")
        # git has checked the files: the commit id is a checksum of them all.
        tree = _git(source, "--git-dir", clone, "ls-tree", "-rz", f"{revision}^{{commit}}").decode("utf-8", "replace")
        blobs = {path: blob for blob, path in re.findall(r"100\d+ blob (\w+)\t([^\0]+)\0", tree)}  # no links
        yield list(blobs), lambda path: _git(source, "--git-dir", clone, "cat-file", "blob", blobs[path])


def _git(source: Source, *arguments: str, timeout: float | None = None) -> bytes:
    """What a git command prints. It never asks for a password. Raises UserError with git's reason if it fails."""
    command = ["git", "-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=30", *arguments]  # 30 silent seconds
    environment = os.environ | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": ""}
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "env": environment, "timeout": timeout}
    try:
        return subprocess.run(command, check=True, **options).stdout
    except FileNotFoundError:
        raise UserError(f"git is needed to fetch {source.name}; install it") from None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        reason = (error.stderr or b"no answer in time").decode("utf-8", "replace")
        raise _failure(source.url, reason, "check the network, or name a mirror: see --help") from None


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Turn the hub client's many kinds of exceptions into UserErrors that quote them."""
    from huggingface_hub import constants

    try:
        yield
    except Exception as error:
        what = f"{source.name} on {constants.ENDPOINT}"
        fix = "check the network, set HF_TOKEN if access is restricted, or name a mirror in HF_ENDPOINT"
        raise _failure(what, str(error).strip() or type(error).__name__, fix) from None


def _failure(what: str, reason: str, fix: str) -> UserError:
    """One sentence, without any password or token in an address: what stands before its host and after a `?` or `#`."""
    sentence = f"{what} could not be fetched ({' '.join(reason.split())}); {fix}"
    shown = re.sub(r"(\w+://)?[^\s'\"(]*@", r"\1", sentence)
    return UserError(re.sub(r"(://[^\s'\"?#]*[?#])[^\s'\"]*", r"\1…", shown))


def join_xsafety(output: Path) -> int:
    """Join XSafety's files without a header, one per category, into `prompts/XSafety/<Language>.csv`.

    Returns how many of the paper's languages there are; languages without files are left out. Prints the files that
    are left out, and the languages that lack categories of others. Raises UserError for a workbook of other columns.
    """
    joined: dict[str, dict[str, list[str]]] = {}
    for language in PAPER_LANGUAGES:
        folder = output / XSAFETY_FOLDER / language.code.partition("-")[0].replace("es", "sp")
        chosen: dict[str, Path] = {}
        for path in sorted(each for each in folder.glob("*") if each.suffix in (".csv", ".xlsx")):
            name = re.sub(r"_(n|[a-z]{2})$", "", path.stem)  # some names end in `_n` or a language code
            category = MISSPELLED.get(name, name)
            # Hindi has commonsense.csv and commen_sense.csv, the same questions without their last sentence.
            kept = min(filter(None, (chosen.get(category), path)), key=lambda each: _rank(each, category))
            if category in chosen:
                left_out = path if kept != path else chosen[category]
                print(f"XSafety: {left_out} left out; {kept.name} has the same category", file=sys.stderr)
            chosen[category] = kept
        if chosen:
            joined[language.name] = {category: _xsafety_questions(path) for category, path in sorted(chosen.items())}
    every = sorted({category for categories in joined.values() for category in categories})
    for language, categories in joined.items():
        if missing := sorted({*every} - {*categories}):
            print(f"XSafety: {language} lacks {', '.join(missing)}", file=sys.stderr)
        rows = [[question, category] for category in categories for question in categories[category]]
        path, columns = output / JOINED / f"{language}.csv", ["question", "category"]
        if rows and not (path.exists() and list(CsvFile.open(path, columns).rows()) == rows):
            write_rows(path, columns, rows, quote_all=any(map(has_return, rows)))
    return len(joined)


def _rank(path: Path, category: str) -> tuple[bool, bool]:
    """Which of two files of a category goes first: the one that spells it right, then a CSV."""
    return not path.stem.startswith(category), path.suffix != ".csv"


def _xsafety_questions(path: Path) -> list[str]:
    """The questions of one file: a CSV whose unquoted commas belong to the text, or the first column of a workbook."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [",".join(row) for row in csv.reader(file)]
    else:
        import pandas as pd

        table = (
            pd.read_excel(path, header=None, dtype=str, keep_default_na=False)
            .dropna(axis="columns", how="all")
            .fillna("")
        )
        if table.shape[1] > 1:
            raise UserError(f"{path} has {table.shape[1]} columns; one column of questions was expected")
        rows = [text for row in table.to_numpy().tolist() for text in row]
    return [text.strip() for text in rows if text.strip()]
