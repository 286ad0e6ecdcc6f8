"""What is opened and where output goes: only regular files, sound JSON, and places that can be written."""

import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from soteria import disk
from soteria.errors import UserError


@pytest.fixture
def places(tmp_path):
    """A path per kind of thing that is no regular file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    names = ("pipe", "folder", "nothing", "loop", "socket")
    return {name: tmp_path / name for name in names} | {"device": Path("/dev/null"), "long": tmp_path / ("n" * 300)}


def test_what_is_not_a_file_is_neither_read_nor_written_and_named(places):
    for name, path in places.items():
        for use in (disk.regular_file, disk.read_text, disk.load_json, disk.check_output):
            with pytest.raises(UserError) as error:
                use(path)
            assert str(path)[:30] in str(error.value) or name == "long"
        if name != "folder":
            with pytest.raises(UserError):
                disk.check_output(path, is_folder=True)
            with pytest.raises(UserError):
                disk.check_output(path / "sub" / "file")
    assert disk.check_output(places["folder"], is_folder=True) == places["folder"]


def test_an_output_needs_a_name_and_folders_that_can_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("", ".", "..", "a/..", "/", "n" * 201, "é" * 101):
        for is_folder in (True, False):
            with pytest.raises(UserError, match=r"name"):
                disk.check_output(Path(path), is_folder=is_folder)
    Path("file").touch()
    for path, is_folder in (("file/below", False), ("file", True), ("\0", False), ("\udcff/new", False)):
        with pytest.raises(UserError, match=r"cannot be written|not a folder|not UTF-8"):
            disk.check_output(Path(path), is_folder=is_folder)
    for path in ("file", "new/sub/file"):
        assert disk.check_output(Path(path)) == Path(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


DEEP = b"[" * 950 + b"]" * 950


@pytest.mark.parametrize(
    "text",
    [b"{", b"", b"\xff", b"[" * 10**5, DEEP, b'{"a": 1, "a": 2}', b"[NaN]", b"[1e999]", b'["\\ud800"]', b"9" * 5000],
)
def test_json_that_people_would_read_otherwise_or_that_is_broken_is_refused_by_its_place(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"a\.json is not (valid JSON|UTF-8)") as error:
        disk.load_json(path)
    assert "\n" not in str(error.value)


def test_json_as_programs_write_it_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1, "a": [NaN, Infinity, "\\ud83d\\ude00"]}')
    assert disk.load_json(path, strict=False)["a"][2] == "😀"


def test_a_text_beyond_the_bound_is_refused(tmp_path, monkeypatch):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**40)
    monkeypatch.setattr(disk, "MAX_BYTES", 2**10)
    with pytest.raises(UserError, match=r"a\.json has more than"):
        disk.load_json(tmp_path / "a.json")


def test_reading_a_small_file_makes_room_for_no_more(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    tracemalloc.start()
    disk.load_json(tmp_path / "a.json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6


def test_a_folder_to_make_whose_name_is_too_long_is_refused_before_those_above_it_are_made(tmp_path):
    assert disk.check_output(tmp_path / "new" / ("n" * 255) / "list.json")
    with pytest.raises(UserError, match="of 256 bytes is too long"):
        disk.check_output(tmp_path / "new" / ("n" * 256) / "list.json")
