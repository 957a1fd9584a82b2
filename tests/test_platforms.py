"""What Windows and macOS do otherwise, as far as Linux can act it."""

from __future__ import annotations

import fcntl
import io
import os
import struct
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from texforce_cli import errors, files
from texforce_cli.cli.app import run
from texforce_cli.diffusion.models import resolve_model
from texforce_cli.errors import UsageError
from texforce_cli.lora.write import lora_bytes
from texforce_cli.rewards import environments, isolation, worker
from texforce_cli.rewards.places import Place
from texforce_cli.team import start
from texforce_cli.team.store import Folder
from texforce_cli.workflows import checkpoint
from texforce_cli.workflows.evaluation.pictures import foreign_pictures
from texforce_cli.workflows.evaluation.variants import Variant, check_variants, parse_variant, read_variants


def test_what_a_pipe_has_no_letters_for_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB"}
    path = tmp_path / "日本.safetensors"
    path.write_bytes(lora_bytes({key: np.ones((4, 4), np.float32) for key in sorted(weights)}, {}))
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, encoding="cp1252"))
    assert run(["fuse", "--inspect", str(path)]) == 0
    sys.stdout.flush()
    assert rb"\u65e5\u672c.safetensors" in pipe.getvalue()


@pytest.mark.parametrize(
    ("platform", "path", "word"),
    [
        ("linux", "runs/a b", "'runs/a b'"),
        ("win32", "runs\\a b", '"runs\\a b"'),
        ("win32", "runs\\demo-1\\adapter", "runs\\demo-1\\adapter"),
    ],
)
def test_a_command_to_paste_is_quoted_as_the_shell_wants_it(
    monkeypatch: pytest.MonkeyPatch, platform: str, path: str, word: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert errors.quoted(path) == word


# files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files that are in use when they are next replaced, read or removed."""
    names: list[str] = []

    def once_busy(step: Callable[..., Any]) -> Callable[..., Any]:
        def tried(self: Path, *target: Path, **how: bool) -> Any:
            if (name := (*target, self)[0].name) in names:
                names.remove(name)
                raise PermissionError(13, "it is in use", name)
            return step(self, *target, **how)

        return tried

    for step in ("replace", "read_bytes", "unlink"):
        monkeypatch.setattr(Path, step, once_busy(getattr(Path, step)))
    monkeypatch.setattr(files, "_PAUSES", (0, 0))
    return names


def test_a_file_that_is_in_use_for_a_moment_is_replaced_all_the_same(tmp_path: Path, busy: list[str]) -> None:
    (tmp_path / "run.json").write_text("old", encoding="utf-8")
    busy += ["run.json", "run.json"]
    files.write_text(tmp_path / "run.json", "new")
    assert (tmp_path / "run.json").read_text(encoding="utf-8") == "new"
    busy += ["run.json"] * 3
    with pytest.raises(files.NotWritten):
        files.write_text(tmp_path / "run.json", "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_word_that_another_process_has_open_for_a_moment_is_said_heard_and_forgotten(
    tmp_path: Path, busy: list[str]
) -> None:
    store = Folder(tmp_path)
    busy += ["pulse-1"]
    store.set("pulse/1", b"2 0")
    busy += ["pulse-1"]
    assert store.get("pulse/1") == b"2 0"
    busy += ["pulse-1"]
    assert store.delete_key("pulse/1") and not store.check(["pulse/1"]) and not busy


@pytest.mark.parametrize("number", [5, 32])
def test_a_table_that_is_open_in_another_program_is_to_be_closed(tmp_path: Path, number: int) -> None:
    error = PermissionError(13, "Access is denied")
    error.winerror = number  # type: ignore[attr-defined]
    (tmp_path / "summary.csv").write_bytes(b"")
    assert "a program has it open" in str(files.write_error(tmp_path / "summary.csv", error))
    assert "choose another folder" in str(files.write_error(tmp_path / "new.csv", error))


def test_a_checkpoint_that_was_loaded_can_be_removed(tmp_path: Path) -> None:
    """Windows removes no file that is mapped into memory."""
    saved = checkpoint.Checkpoint(1, {"a": torch.arange(5000.0)}, {})
    checkpoint.save(tmp_path, saved, b"lora")
    found, damaged = checkpoint.load_latest(tmp_path)
    assert found is not None and not damaged and torch.equal(found.tensors["a"], saved.tensors["a"])
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["con", "NUL", "aux.v2", "a.", "com1"])
def test_a_variant_is_called_what_a_folder_can_be_called(name: str) -> None:
    with pytest.raises(UsageError, match="is no name for a variant"):
        parse_variant(f"{name}=tiny")


@pytest.mark.parametrize("name", ["a", "console", "aux2", "v1.5", "a_"])
def test_other_names_are_free(name: str) -> None:
    assert parse_variant(f"{name}=tiny").name == name


def test_variants_do_not_share_a_folder_where_large_and_small_letters_are_the_same() -> None:
    with pytest.raises(UsageError, match="'Tex' is given twice"):
        check_variants([Variant("Tex"), Variant("tex")], None)


def test_files_that_begin_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "variants.toml").write_bytes(mark + b'[[variants]]\nname = "a"\nmodel = "tiny"\n')
    assert [variant.name for variant in read_variants(tmp_path / "variants.toml")] == ["a"]
    (tmp_path / "metadata.jsonl").write_bytes(mark + b'{"file_name": "a.png", "prompt": "a cat"}\r\n')
    assert foreign_pictures(Variant("a", images=str(tmp_path)), []) == {}


@pytest.mark.parametrize("name", ["C:/sd15", "C:\\models/sd15", "models\\sd/15", "~/sd15", "./sd15", "/sd15"])
def test_a_path_where_nothing_is_is_no_repository(name: str) -> None:
    with pytest.raises(UsageError, match="unknown model"):
        resolve_model(name)


# processes ------------------------------------------------------------------------------------------------------------


def test_processes_meet_at_the_interface_that_leads_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def address(text: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(address=text)

    there = {"Ethernet": [address("10.0.0.7")], "Loopback Pseudo-Interface 1": [address("::1"), address("127.0.0.1")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: there)
    assert start._loopback() == "Loopback Pseudo-Interface 1"


def test_ctrl_c_is_not_for_a_worker_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: dict[str, Any] = {}

    def popen(command: list[str], **how: Any) -> None:
        begun.update(how)
        raise OSError(2, "no such file")

    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(isolation.WorkerFailure):
        isolation._spawn(Place("python"))
    assert begun["creationflags"] == 512


def test_a_reward_may_print_any_letter_in_its_worker(tmp_path: Path) -> None:
    (tmp_path / "talker.py").write_text("class Talker:\n    def __init__(self): print('日本')\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdin and process.stdout
        start = {"type": "start", "protocol": worker.PROTOCOL, "factory": "talker:Talker"}
        worker.write_frame(process.stdin, start)  # type: ignore[arg-type]
        assert worker.read_frame(process.stdout)[0]["type"] == "ready"  # type: ignore[arg-type]
        worker.write_frame(process.stdin, {"type": "stop"})  # type: ignore[arg-type]
        assert "日本" in process.communicate(timeout=60)[1].decode("utf-8")


def test_where_memory_cannot_be_limited_a_worker_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    start = {"type": "start", "protocol": worker.PROTOCOL, "factory": "builtins:dict", "memory_limit": 10**9}
    with pytest.raises(OSError, match="leave out --reward-memory"):
        worker._Worker().answer(start, b"")


def test_the_pins_for_cuda_are_for_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert environments.automatic_variant() == "cuda"
    monkeypatch.setattr(sys, "platform", "win32")
    assert environments.automatic_variant() == "cpu"


@pytest.mark.parametrize("said", ["[WinError 112] There is not enough space on the disk", "failed (os error 112)"])
def test_a_full_disk_of_windows_is_called_full(said: str) -> None:
    assert "no space left" in str(environments._refusal(f"error: {said}"))


@pytest.fixture
def windows_locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No fcntl, and msvcrt.locking as Windows has it: locks of bytes that belong to an open file."""

    def locking(handle: int, mode: int, count: int) -> None:
        start = os.lseek(handle, 0, os.SEEK_CUR)
        wanted = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, start, count, 0)
        fcntl.fcntl(handle, fcntl.F_OFD_SETLK, wanted)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setenv("TEXFORCE_HOME", str(tmp_path))


@pytest.mark.usefixtures("windows_locks")
def test_windows_locks_an_environment_for_many_or_for_one() -> None:
    folder = environments.root() / "one" / "env-0"
    folder.mkdir(parents=True)
    with environments._lock(folder, shared=True) as first, environments._lock(folder, shared=True) as second:
        assert first and second
    with environments._lock(folder, shared=False) as alone, environments._lock(folder, shared=True) as late:
        assert alone and not late
    with environments._lock(folder, shared=True), environments._lock(folder, shared=False) as alone:
        assert not alone


@pytest.mark.usefixtures("windows_locks")
def test_windows_keeps_what_a_second_install_is_making() -> None:
    making = environments.root() / ".new-0"
    making.mkdir(parents=True)
    with environments._lock(making, shared=True):
        environments._sweep()
        assert making.exists()
    environments._sweep()
    assert list(environments.root().iterdir()) == []
