"""Whole-or-nothing files and folders beside processes that are alive or killed, and JSON files."""

import errno
import multiprocessing
import time
from pathlib import Path

import pytest

from soteria.storage import files


@pytest.fixture(params=[files.whole_file, files.whole_folder], ids=["file", "folder"])
def write(request):
    """`write(path, text)`: write a file with the text, or a folder with such a file, whole or not at all."""

    def write(path: Path, text: str, then=lambda: None) -> None:
        with request.param(path) as sibling:
            assert sibling.match(f"{path.parent}/.{path.name}.*.tmp")
            (sibling / "inside" if sibling.is_dir() else sibling).write_text(text)
            then()

    return write


def found(folder: Path) -> dict[str, str]:
    return {path.name: (path / "inside" if path.is_dir() else path).read_text() for path in folder.iterdir()}


def test_a_block_that_succeeds_replaces_the_old_content_and_one_that_fails_leaves_it(write, tmp_path):
    for text in ("old", "new"):
        write(tmp_path / "sub" / "m", text)
        assert found(tmp_path / "sub") == {"m": text}
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "sub" / "m", "half", lambda: 1 / 0)
    assert found(tmp_path / "sub") == {"m": "new"}


def test_what_a_killed_process_left_is_removed_but_not_what_a_live_one_is_writing(write, tmp_path):
    fork = multiprocessing.get_context("fork")
    entered = fork.Event()
    half = (tmp_path / "m", "half", lambda: (entered.set(), time.sleep(600)))
    child = fork.Process(target=write, args=half, daemon=True)
    child.start()
    assert entered.wait(60)
    write(tmp_path / "m", "one")
    assert sorted(found(tmp_path).values()) == ["half", "one"]
    child.kill()
    child.join()
    write(tmp_path / "n", "other")
    assert sorted(found(tmp_path).values()) == ["half", "one", "other"]
    write(tmp_path / "m", "two")
    assert found(tmp_path) == {"m": "two", "n": "other"}


def test_without_locks_files_are_written_and_nothing_is_taken_for_left_behind(write, tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    (tmp_path / ".m.0.tmp").write_text("half")
    write(tmp_path / "m", "whole")
    assert found(tmp_path) == {".m.0.tmp": "half", "m": "whole"}


def test_whoever_may_not_read_a_file_or_folder_may_not_read_what_replaces_it(write, tmp_path):
    write(tmp_path / "m", "old")
    usual = (tmp_path / "m").stat().st_mode
    others = []
    for mode in (0o700, 0o500):
        (tmp_path / "m").chmod(mode)
        write(tmp_path / "m", "new", lambda: others.extend(p.stat().st_mode & 0o077 for p in tmp_path.iterdir()))
        assert (tmp_path / "m").stat().st_mode & 0o777 == mode != usual & 0o777
    assert others == [0] * 4  # nor while it is written


def test_json_is_written_for_people_and_read_without_errors(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"क": [1]})
    assert path.read_text("utf-8") == '{\n  "क": [\n    1\n  ]\n}\n'
    assert files.read_json(path) == files.read_facts(path) == {"क": [1]}
    for content, value in ((b"{", None), (b"\xff\xfe{\0", None), (b"[1]", [1])):
        path.write_bytes(content)
        assert (files.read_json(path), files.read_facts(path)) == (value, {})
    assert files.read_json(tmp_path / "none") is None


def test_a_temporary_name_taken_for_left_behind_before_it_is_locked_is_made_again(write, tmp_path, monkeypatch):
    lock_descriptor, removed = files.lock_descriptor, []

    def lock(descriptor, *, blocking=True):
        if not removed:  # another process was faster
            removed.extend(tmp_path.glob(".m.*.tmp"))
            files._remove(removed[0])
        return lock_descriptor(descriptor, blocking=blocking)

    monkeypatch.setattr(files, "lock_descriptor", lock)
    write(tmp_path / "m", "whole")
    assert removed and found(tmp_path) == {"m": "whole"}


def test_many_processes_write_one_place_at_once_and_none_fails(write, tmp_path):
    fork = multiprocessing.get_context("fork")

    def work(name: str) -> None:
        for _ in range(20):
            write(tmp_path / "m", name)

    children = [fork.Process(target=work, args=(name,)) for name in "abcd"]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert list(found(tmp_path)) == ["m"] and found(tmp_path)["m"] in "abcd"
