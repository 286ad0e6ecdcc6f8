"""The authors' original inputs: where they lie, and how they come here whole, checked, and only once.

Knows git repositories, datasets of the hub and checksums; knows nothing of what is in the files.

The output folder holds, beside the files, `SHA256SUMS` (for `sha256sum -c`), `sources.json` (for each folder the
source, its revision, and the number of files once all have come) and `.repositories/` (git objects, from which a broken
file is mended without a network).
"""

import fcntl
import glob
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from soteria.errors import UserError
from soteria.storage import files

KINDS = ("icl", "heads", "prompts")
RELEASE_URL = "https://github.com/NeuralSentinel/Soteria"
RELEASE_COMMIT = "9d9818283a1e54d48db9fbdb89eb6bfbefa510ef"
# What a dataset's folder may hold: data, and what says where it is from and how it may be used. No code.
DATA_ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt", ".xlsx", ".md")
LICENSES = ("LICENSE", "LICENCE")
PATIENCE = 10.0  # seconds for a first answer; after it, the network counts as absent


@dataclass(frozen=True)
class Folder:
    """A folder of the output, and which files of its source belong in it: those whose whole path fits `pattern`.

    The pattern's group is the path inside the folder.
    """

    kind: str  # one of KINDS
    path: str
    pattern: str

    def name_of(self, path: str) -> str | None:
        """The name here of a file of the source, or None where it does not belong here."""
        found = re.fullmatch(self.pattern, path)
        return found and found[1]


def prompts_folder(source: str) -> Folder:
    """The folder of a source's prompts, named as elsewhere for a hub id. It takes all data files of the source."""
    endings = "|".join(re.escape(ending) for ending in DATA_ENDINGS)
    return Folder(
        "prompts", f"prompts/{source.replace('/', '_')}", rf"(.*(?:{endings})|(?:.*/)?(?:{'|'.join(LICENSES)}))"
    )


# --- what has come ---------------------------------------------------------------------------------------------------


class Store:
    """What has come to an output folder, by its `sources.json` and `SHA256SUMS`."""

    def __init__(self, output: Path):
        self.output = output
        self._facts_file, self._sums_file = output / "sources.json", output / "SHA256SUMS"
        self._facts = files.read_facts(self._facts_file)
        self._sums: dict[str, str] = {}
        if self._sums_file.exists():
            text = self._sums_file.read_text(encoding="utf-8", errors="replace")
            self._sums = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (.+)\n", text, re.MULTILINE)}

    def _fact(self, folder: Folder) -> dict:
        fact = self._facts.get(folder.path)
        return fact if isinstance(fact, dict) else {}

    def revision(self, folder: Folder) -> str | None:
        """The revision that a folder is kept to, or None before its first use."""
        return self._fact(folder).get("revision")

    def count(self, folder: Folder) -> int:
        """How many files a folder has by SHA256SUMS."""
        return len(self.sums(folder))

    def sums(self, folder: Folder) -> dict[str, str]:
        """The sha256 on record, by the file's name in the folder."""
        prefix = f"{folder.path}/"
        return {name.removeprefix(prefix): digest for name, digest in self._sums.items() if name.startswith(prefix)}

    def is_sound(self, folder: Folder, revision: str | None) -> bool:
        """Whether all files of that revision are there with the bytes on record. Those that are not are named."""
        sums, fact = self.sums(folder), self._fact(folder)
        if not sums or fact.get("files") != len(sums) or fact.get("revision") != revision:
            return False
        broken = [name for name, digest in sums.items() if _sha256(self.output / folder.path / name) != digest]
        for name in broken:
            path = self.output / folder.path / name
            what = "was changed or cut short" if path.exists() else "is gone"
            print(f"{path} {what}; bringing it again", file=sys.stderr)
        return not broken

    def pin(self, folder: Folder, source: str, revision: str) -> None:
        """Keep a folder to a revision from now on. Sums of another revision no longer count."""
        if self.revision(folder) == revision:
            return
        if self.revision(folder):
            self._write_sums({}, folder)
        self._facts[folder.path] = {"source": source, "revision": revision}
        files.write_json(self._facts_file, dict(sorted(self._facts.items())))

    def record(self, folder: Folder, names: list[str]) -> None:
        """All files of the pinned revision have come: write down their sha256."""
        self._write_sums({name: _sha256(self.output / folder.path / name) for name in names}, folder)
        self._facts[folder.path] = self._fact(folder) | {"files": len(names)}
        files.write_json(self._facts_file, dict(sorted(self._facts.items())))

    def _write_sums(self, sums: dict[str, str], folder: Folder) -> None:
        others = {name: digest for name, digest in self._sums.items() if not name.startswith(f"{folder.path}/")}
        self._sums = others | {f"{folder.path}/{name}": digest for name, digest in sums.items()}
        files.write_text(self._sums_file, "".join(f"{self._sums[name]}  {name}\n" for name in sorted(self._sums)))


@contextmanager
def open_store(output: Path) -> Iterator[Store]:
    """The store of an output folder, for one process at a time; others wait. Empty folders do not stay."""
    output.mkdir(parents=True, exist_ok=True)
    handle = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that fetches to {output}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield Store(output)
    finally:
        for folder in (output / ".repositories", output):
            with suppress(OSError):
                folder.rmdir()
        os.close(handle)


def _sha256(path: Path) -> str | None:
    """The sha256 of a file in hexadecimal, or None where there is no file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _blob_id(path: Path) -> str | None:
    """What git calls a file's bytes (sha1 of `blob <length>`, a zero byte and the bytes), or None without a file."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _check_name(name: str, source: str) -> None:
    """Raise UserError for a file name that would lead out of the folder or that SHA256SUMS cannot hold."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable():
        raise UserError(f"{source} has a file named {name!r}, which is not written; ask its owner to rename it")


def _without_secrets(text: str) -> str:
    """A text without the user name and password that an address may hold."""
    return re.sub(r"//[^/@\s]*@", "//", text)


# --- git -------------------------------------------------------------------------------------------------------------


class GitError(Exception):
    """What git says when it fails."""


@dataclass(frozen=True)
class GitSource:
    """A git repository. With `commit=None`, the first use takes the newest commit, and later ones keep to it."""

    name: str
    url: str
    commit: str | None
    folders: tuple[Folder, ...]

    def bring(self, folders: list[Folder], store: Store) -> None:
        """Write those files of these folders that are not there with the right bytes, each whole or not at all.

        Raises UserError where the repository is needed and cannot be had, or is not the right one.
        """
        commit = self.commit or next(filter(None, map(store.revision, folders)), None)
        pending = [folder for folder in folders if not store.is_sound(folder, commit)]
        if not pending:
            return
        repository = Repository(store.output / ".repositories" / f"{self.name.replace('/', '_')}.git", self.url)
        if commit is None:
            commit = repository.remote_head
            if not commit:
                raise UserError(f"{repository.shown} is an empty repository; was the address right?")
            for folder in pending:
                store.pin(folder, self.name, commit)  # a killed run goes on with this commit, not with a newer one
        if not repository.has(commit):
            repository.fetch(commit)
        blobs = repository.blobs(commit)
        for folder in pending:
            wanted = {name: blob for path, blob in blobs.items() if (name := folder.name_of(path))}
            if not wanted:
                raise UserError(f"{self.name} has no files for {folder.path} at commit {commit}; was --git_url right?")
            store.pin(folder, self.name, commit)
            for name, blob in tqdm(wanted.items(), desc=folder.path, unit="file", disable=None):
                _check_name(name, self.name)
                path = store.output / folder.path / name
                if _blob_id(path) != blob:
                    with files.whole_file(path) as sibling:
                        sibling.write_bytes(repository.git("cat-file", "blob", blob))
            store.record(folder, list(wanted))


class Repository:
    """A bare repository in a local folder that holds one commit of a remote one, under the branch `original`."""

    BRANCH = "refs/heads/original"

    def __init__(self, folder: Path, url: str):
        self.folder, self.url, self.shown = folder, url, _without_secrets(url)

    @cached_property
    def remote_head(self) -> str:
        """The commit of the remote HEAD, or nothing where it has none. Raises UserError without an answer in time."""
        if shutil.which("git") is None:
            raise UserError(f"git is needed to fetch {self.shown}; install it")
        try:
            return _git("ls-remote", "--", self.url, "HEAD", timeout=PATIENCE).decode().partition("\t")[0]
        except GitError as error:
            raise UserError(
                f"{self.shown} could not be reached ({error}); check the network, or name a mirror: see --help"
            ) from None

    def has(self, commit: str) -> bool:
        """Whether the commit is here with all its objects, and every object has the bytes that its id says."""
        if not self.folder.is_dir() or shutil.which("git") is None:
            return False
        try:
            self.git("fsck", "--full", "--no-dangling", "--no-progress")
            return self.git("rev-parse", "--verify", f"{self.BRANCH}^{{commit}}").decode().strip() == commit
        except GitError:
            return False

    def fetch(self, commit: str) -> None:
        """Fetch one commit, to a new folder that takes the place of the old one once the commit is there and sound."""
        _ = self.remote_head  # a server that does not answer is found out within PATIENCE
        print(f"fetching {self.shown}", file=sys.stderr)
        with files.whole_folder(self.folder) as folder:
            new = Repository(folder, self.url)
            _git("init", "--bare", "--quiet", "--template=", "--object-format=sha1", str(folder))
            everything = ("--", self.url, "+refs/heads/*:refs/remotes/all/*", "+refs/tags/*:refs/tags/*")
            try:
                try:
                    new.git(*_FETCH, "--depth=1", "--", self.url, f"+{commit}:{self.BRANCH}")
                except GitError:  # not every server gives single commits, or without their history
                    new.git(*_FETCH, *everything)
            except GitError as error:
                raise UserError(f"{self.shown} could not be fetched ({error}); the same command tries again") from None
            with suppress(GitError):
                new.git("update-ref", self.BRANCH, commit)
            if not new.has(commit):
                raise UserError(f"{self.shown} has no sound commit {commit}; was the address right?")

    def blobs(self, commit: str) -> dict[str, str]:
        """The blob of every plain file of a commit, by its path."""
        entries = self.git("ls-tree", "-r", "-z", "--full-tree", commit).decode("utf-8", "replace").split("\0")
        found = (re.fullmatch(r"100\d{3} blob (\w+)\t(.+)", entry, re.DOTALL) for entry in entries)
        return {entry[2]: entry[1] for entry in found if entry}

    def git(self, *arguments: str) -> bytes:
        return _git(f"--git-dir={self.folder}", *arguments)


# A server that sends nothing for 30 seconds is given up.
_FETCH = ("-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=30", "-c", "gc.auto=0", "fetch", "--no-tags")


def _git(*arguments: str, timeout: float | None = None) -> bytes:
    """What a git command prints. Raises GitError with its last words. It asks no questions, and outlives nobody."""
    environment = os.environ | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": ""}
    process = subprocess.Popen(
        ["git", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # git starts helpers, which are ended with it
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise GitError(f"no answer in {timeout:g} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        words = [line for line in errors.decode("utf-8", "replace").splitlines() if line.strip()]
        said = next((line for line in words if line.startswith("fatal: ")), words[-1] if words else "git failed")
        raise GitError(_without_secrets(re.sub(r"^fatal: (unable to access '[^']*': )?", "", said)))
    return output


# --- the hub ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubSource:
    """A dataset of the Hugging Face hub. The first use takes its newest revision, and later ones keep to it."""

    name: str

    @property
    def folders(self) -> tuple[Folder, ...]:
        return (prompts_folder(self.name),)

    def bring(self, folders: list[Folder], store: Store) -> None:
        """Download those data files that are not there with the right bytes.

        Raises UserError where the hub is needed and cannot be had, or sends other bytes than it lists or once sent.
        """
        for folder in folders:
            if not store.is_sound(folder, store.revision(folder)):
                self._download(folder, store)

    def _download(self, folder: Folder, store: Store) -> None:
        from huggingface_hub import snapshot_download

        revision, entries = self._listing(store.revision(folder))
        listed = {entry.rfilename: entry for entry in entries if folder.name_of(entry.rfilename)}
        if not listed:
            raise UserError(f"{self.name} has no data files ({', '.join(DATA_ENDINGS)}) at revision {revision}")
        store.pin(folder, self.name, revision)
        if len(listed) < len(entries):
            others = sorted(entry.rfilename for entry in entries if entry.rfilename not in listed)
            print(f"{self.name}: left out, being no data: {', '.join(others)}", file=sys.stderr)
        there, sums = store.output / folder.path, store.sums(folder)

        def is_right(name: str) -> bool:
            return _is_listed(there / name, listed[name]) and sums.get(name) in (None, _sha256(there / name))

        for name in listed:
            _check_name(name, self.name)
            if not is_right(name):
                (there / name).unlink(missing_ok=True)  # the hub's client would take it for the one it once wrote
        print(f"fetching {self.name}", file=sys.stderr)
        try:
            snapshot_download(
                self.name,
                repo_type="dataset",
                revision=revision,
                local_dir=there,
                allow_patterns=[glob.escape(name) for name in listed],
            )
        except Exception as error:  # the client raises many kinds
            raise UserError(f"{self.name} could not be fetched ({_reason(error)}); the same command goes on") from None
        finally:
            for left in there.glob(".cache/huggingface/download/**/*.incomplete"):  # of killed runs
                left.unlink(missing_ok=True)
        wrong = [name for name in listed if not is_right(name)]
        for name in wrong:
            (there / name).unlink(missing_ok=True)
        if wrong:
            raise UserError(
                f"{self.name} sent other bytes for {', '.join(wrong)} than it lists, or than {store.output}/SHA256SUMS "
                "has from the first use; they are not kept. Where the sum is what is wrong, remove its line"
            )
        store.record(folder, list(listed))

    def _listing(self, revision: str | None) -> tuple[str, list]:
        """A revision, or else the newest, and the hub's entries of its files with their checksums."""
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        where = f"{self.name} on {_without_secrets(constants.ENDPOINT)}"
        try:
            listing = HfApi().dataset_info(self.name, revision=revision, timeout=PATIENCE, files_metadata=True)
        except GatedRepoError:
            mend = "accept its terms on its page, and set HF_TOKEN or run `hf auth login`"
            raise UserError(f"{where} is given only to those who accepted its terms; {mend}") from None
        except RevisionNotFoundError:
            raise UserError(f"{where} no longer has revision {revision}, to which sources.json keeps it") from None
        except RepositoryNotFoundError:
            raise UserError(f"{where} does not exist, or is private; set HF_TOKEN where you may have it") from None
        except Exception as error:  # the client raises many kinds
            mend = "check the network, or name a mirror in HF_ENDPOINT"
            raise UserError(f"{where} could not be reached ({_reason(error)}); {mend}") from None
        if not listing.sha or revision not in (None, listing.sha):
            raise UserError(f"{where} gave revision {listing.sha}, not {revision}; name another HF_ENDPOINT")
        return listing.sha, listing.siblings or []


def _is_listed(path: Path, entry) -> bool:
    """Whether a file is there with the checksum that the hub lists: a sha256 for large files, else git's blob id."""
    if not path.is_file():
        return False
    if entry.lfs:
        return _sha256(path) == entry.lfs.sha256
    return entry.blob_id is None or _blob_id(path) == entry.blob_id  # a mirror may list no checksums


def _reason(error: Exception) -> str:
    """The first line of an error, without secrets."""
    return _without_secrets((str(error).strip() or type(error).__name__).splitlines()[0])


# --- the sources -----------------------------------------------------------------------------------------------------


def sources(git_url: str = RELEASE_URL) -> list[GitSource | HubSource]:
    """Where the original inputs come from, the authors' repository by the address given."""
    return [
        GitSource(
            "NeuralSentinel/Soteria",
            git_url,
            RELEASE_COMMIT,
            (
                Folder("icl", "icl", r"dataset_files/abstractive/([^/]+\.json)"),
                Folder("heads", "heads", r"src/Multilingual_Codes/Heads/([^/]+/[^/]+\.json)"),
            ),
        ),
        HubSource("DAMO-NLP-SG/MultiJail"),
        HubSource("SoftMINER-Group/Soteria"),  # the authors' release, XThreatBench among it
        GitSource(
            XSAFETY := "Jarviswang94/Multilingual_safety_benchmark",
            f"https://github.com/{XSAFETY}",
            None,
            (prompts_folder(XSAFETY),),
        ),
    ]
