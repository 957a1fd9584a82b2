"""Files are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from texforce_cli import files
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.workflows import checkpoint


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(os.name != "posix", reason="opens folders")
def test_a_file_is_on_the_disk_before_it_is_renamed_and_its_name_is_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "a.json", []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append(("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file", path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_json(path, {"a": 1})
    assert seen == [("file", False), ("folder", True)]
    seen.clear()
    files.write_json(tmp_path / "new" / "newer" / "b.json", {})
    assert [kind for kind, _ in seen] == ["folder", "folder", "file", "folder"]  # the new folders' own names first
    seen.clear()
    files.write_json(tmp_path / "new" / "newer" / "b.json", {})
    assert [kind for kind, _ in seen] == ["file", "folder"]


@pytest.mark.parametrize("links", [True, False])
def test_a_fresh_name_is_given_to_a_whole_file_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    path, there = tmp_path / "a.txt", []

    def no_links(self: Path, other: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", no_links)
    monkeypatch.setattr(files, "flush", lambda place: there.append(path.exists()))
    for text, outcome in (
        ("ours", contextlib.nullcontext()),
        ("other", pytest.raises(UsageError, match=r"a.txt' has appeared meanwhile")),
    ):
        with outcome, files.atomic_path(path, fresh=True) as temporary:
            temporary.write_text(text)
    assert (path.read_text(), list(tmp_path.iterdir()), there) == ("ours", [path], [False, True])


@pytest.mark.skipif(os.name != "posix", reason="opens folders")
@pytest.mark.parametrize(("number", "told"), [(errno.EIO, True), (errno.ENOSPC, True), (errno.EINVAL, False)])
def test_a_disk_that_cannot_keep_a_name_is_told_and_a_file_system_that_syncs_none_is_not(
    number: int, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(files.NotWritten) if told else contextlib.nullcontext():
        files.write_json(tmp_path / "a.json", {"a": 1})


@pytest.mark.parametrize(
    ("number", "sentence"),
    [(errno.ENOSPC, "no space left"), (errno.EACCES, "cannot be written"), (errno.EIO, "could not be written")],
)
def test_the_sentence_of_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    def fail(self: Path, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(TexforceError, match=sentence) as caught:
        files.write_bytes(tmp_path / "a", b"x")
    assert str(tmp_path) in str(caught.value) and caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(TexforceError, match="could not be written"):
        files.write_text(tmp_path / "a" / "b", "x")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1_000_000)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


def test_where_things_are_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TEXFORCE_HOME", str(tmp_path))
    assert files.user_folder("cache") == tmp_path / "cache"
    monkeypatch.delenv("TEXFORCE_HOME")
    assert "texforce" in str(files.user_folder("data"))


def test_a_folder_is_held_by_one_process_alone(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from texforce_cli.files import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(TexforceError, match="another process works in"), files.held(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    with files.held(tmp_path):  # the lock ends with its process, even a killed one
        pass


def test_a_lock_that_a_lost_machine_has_left_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    def without(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "no flock here")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", without)
    with pytest.warns(UserWarning, match="flock not supported"), files.held(tmp_path):
        left = (tmp_path / ".lock").read_bytes()
    (tmp_path / ".lock").write_bytes(left.replace(socket.gethostname().encode(), b"a-lost-machine"))
    with pytest.warns(UserWarning), pytest.raises(TexforceError) as caught, files.held(tmp_path):
        pass
    assert caught.value.hint is not None and f"delete '{tmp_path / '.lock'}'" in caught.value.hint


def test_a_file_of_lines_that_was_removed_meanwhile_begins_anew(tmp_path: Path) -> None:
    lines, _ = files.Lines.opened(tmp_path / "a.jsonl")
    lines.append(b"1", b"2")
    (tmp_path / "a.jsonl").unlink()
    lines.append(b"3")
    assert (tmp_path / "a.jsonl").read_bytes() == b"3\n"


def test_what_a_spreadsheet_gets(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "a.csv", [["", "a cat", "=1+1", "-x"], [None, float("nan"), 0.1, 3]])
    assert (tmp_path / "a.csv").read_bytes() == b",a cat,'=1+1,'-x\n,,0.1,3\n"


def test_a_name_that_is_no_utf8_is_written_and_read_again(tmp_path: Path) -> None:
    name = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    files.write_json(tmp_path / "a.json", {"prompts": name, "beside": "café"})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"prompts": name, "beside": "café"}
    files.write_json(tmp_path / "b.json", {"beside": "café"})
    assert "café" in (tmp_path / "b.json").read_text("utf-8")
    files.write_text(tmp_path / "a.txt", f"prompts of {name}")
    assert (tmp_path / "a.txt").read_text("utf-8") == "prompts of caf?.txt"


@pytest.mark.skipif(os.name != "posix", reason="opens folders")
def test_a_checkpoints_name_is_on_the_disk_when_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[Path, list[str]]] = []
    monkeypatch.setattr(
        checkpoint, "settle", lambda folder: synced.append((folder, [path.name for path in folder.iterdir()]))
    )
    checkpoint.save(tmp_path, checkpoint.Checkpoint(1, {}, {}), b"lora")
    assert synced == [(tmp_path, ["epoch_0001"])]
