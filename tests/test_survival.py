"""What a run survives, through the real command: full disks, folders that may not be changed or are gone, clocks, NaN."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_train import made, rows, train

from texforce_cli.algorithms.ddpo import DDPO
from texforce_cli.cli.app import run
from texforce_cli.files import write_error
from texforce_cli.workflows import training_run
from texforce_cli.workflows.checkpoint import load_latest
from texforce_cli.workflows.heldout import HeldOut
from texforce_cli.workflows.training_run import TrainingRun


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run of three epochs makes that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train("--out", str(out), epochs=3)
    return made(out)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def said_by(capsys: pytest.CaptureFixture[str]) -> str:
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    return said


def around_the_second(what: str, block: Callable[[], AbstractContextManager[None]], patch: pytest.MonkeyPatch) -> None:
    """A run writes its metrics or its checkpoint for the second time, or its first pictures, within `block`."""
    owner, name = {
        "metrics": (training_run, "write_rows"),
        "checkpoint": (training_run.checkpoints, "save"),
        "samples": (HeldOut, "save_pictures"),
    }[what]
    real, calls = getattr(owner, name), ["first"] if what == "samples" else []

    def called(*about: Any, **more: Any) -> None:
        if what != "metrics" or about[0].name == "metrics.jsonl":
            calls.append("another")
        with block() if len(calls) == 2 else contextlib.nullcontext():
            real(*about, **more)

    patch.setattr(owner, name, called)


def in_mid_run(epochs: int, do: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Let a run do this once, while it draws the pictures of the next epoch after so many."""
    progress, done_already = TrainingRun._progress, list[bool]()

    def progressed(self: TrainingRun, phase: str, done: int, total: int, **reward: float) -> None:
        if self.epoch == epochs and phase == "sampling" and not done_already:
            done_already.append(True)
            do()
        progress(self, phase, done, total, **reward)

    patch.setattr(TrainingRun, "_progress", progressed)


def is_whole(folder: Path, epoch: int) -> None:
    """The checkpoint of this epoch is the last one, and nothing half written lies about."""
    found, damaged = load_latest(folder / "checkpoints")
    assert found is not None and found.epoch == epoch and not damaged
    assert not list(folder.rglob("*.tmp*"))


@pytest.mark.parametrize(
    ("what", "saved"),
    [
        ("checkpoint", 1),
        pytest.param("metrics", 1, marks=pytest.mark.slow),
        pytest.param("samples", 2, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_up_stops_the_run_and_with_room_it_goes_on(
    what: str,
    saved: int,
    disk: Path,
    whole: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last bytes of a real file system: a write of more than 8 kB breaks off in its middle."""
    filler, out = disk / "filler", disk / "run"

    @contextlib.contextmanager
    def filled() -> Iterator[None]:
        with filler.open("wb", buffering=0) as handle, contextlib.suppress(OSError):
            while handle.write(bytes(4096)):
                pass
        if what != "metrics":  # they are smaller
            os.truncate(filler, filler.stat().st_size - 8192)
        yield

    with monkeypatch.context() as patch:
        around_the_second(what, filled, patch)
        train("--out", str(out), epochs=3, code=1)
    said = said_by(capsys)
    assert f"no space left on the disk to write '{out}/" in said
    assert f"go on with: texforce train --resume {out}" in said
    is_whole(out, saved)
    filler.unlink()
    assert run(["train", "--resume", str(out)]) == 0
    assert made(out) == whole


@pytest.mark.parametrize(("what", "saved"), [("checkpoint", 1), pytest.param("samples", 2, marks=pytest.mark.slow)])
def test_a_file_that_breaks_off_in_its_middle_stops_the_run(
    what: str, saved: int, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk, by a limit that needs no rights: no file may grow beyond 8 kB."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limited() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        around_the_second(what, limited, patch)
        train("--out", "a", epochs=3, code=1)
    said = said_by(capsys)
    assert "could not be written" in said and "go on with: texforce train --resume a" in said
    assert json.loads(Path("a/run.json").read_text())["status"] == "failed"
    is_whole(Path("a"), saved)
    assert run(["train", "--resume", "a"]) == 0
    assert made(Path("a")) == whole


@pytest.mark.slow
def test_a_disk_that_becomes_read_only_stops_the_run(
    disk: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kernel does after a fault of the disk."""
    out = disk / "run"

    @contextlib.contextmanager
    def read_only() -> Iterator[None]:
        for how in (["--bind", str(out), str(out)], ["-o", "remount,bind,ro", str(out)]):
            subprocess.run(["mount", *how], check=True)
        yield

    with monkeypatch.context() as patch:
        around_the_second("metrics", read_only, patch)
        train("--out", str(out), epochs=3, code=1)
    said = said_by(capsys)
    assert f"'{out}' cannot be written; when that is mended, go on with: texforce train --resume {out}" in said
    assert run(["train", "--resume", str(out)]) == 1
    assert "cannot be written" in said_by(capsys)
    train("--out", str(out / "another"), code=1)
    assert "cannot be written; choose another folder with --out" in said_by(capsys)
    subprocess.run(["umount", str(out)], check=True)
    is_whole(out, 1)
    assert run(["train", "--resume", str(out)]) == 0
    assert made(out) == whole


def test_a_folder_that_may_not_be_written_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rights do not bind the superuser, so the refusal is the system's by injection."""
    real = os.mkdir

    def refused(path: Any, *about: Any, **more: Any) -> None:
        if Path(path).name == "kept":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        real(path, *about, **more)

    monkeypatch.setattr(os, "mkdir", refused)
    train("--out", "kept", code=1)
    assert "cannot be written; choose another folder with --out" in said_by(capsys)


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("--out", "a", "--eval-images", "0")
    real, before = Path.read_bytes, made(Path("a"))

    def stale(self: Path) -> bytes:
        if self.name == "state.safetensors":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stale)
        assert run(["train", "--resume", "a"]) == 1
    assert f"epoch_0002' cannot be read ({os.strerror(errno.ESTALE)}); resume when that is mended" in said_by(capsys)
    is_whole(Path("a"), 2)
    assert made(Path("a")) == before


def test_a_full_disk_does_not_hide_why_a_run_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record, ending = training_run.RunFolder.write_record, list[int]()

    def ask_to_end() -> None:
        ending.append(1)
        os.kill(os.getpid(), signal.SIGTERM)

    def full(self: training_run.RunFolder, record: Any) -> None:
        if ending:
            raise write_error(self.record, OSError(errno.ENOSPC, "No space left on device"))
        write_record(self, record)

    in_mid_run(1, ask_to_end, monkeypatch)
    monkeypatch.setattr(training_run.RunFolder, "write_record", full)
    train("--out", "a", epochs=9, code=143)
    assert "1 of 9 epochs and 4 images of the next are saved in 'a'; go on with: texforce train --resume a" in said_by(
        capsys
    )


def test_a_disk_that_is_full_at_the_very_end_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record = training_run.RunFolder.write_record

    def full(self: training_run.RunFolder, record: Any) -> None:
        if record["status"] == "finished":
            raise write_error(self.record, OSError(errno.ENOSPC, "No space left on device"))
        write_record(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(training_run.RunFolder, "write_record", full)
        train("--out", "a", "--eval-images", "0", epochs=1, code=1)
    assert "when that is mended, go on with: texforce train --resume a" in said_by(capsys)
    assert run(["train", "--resume", "a"]) == 0
    assert json.loads(Path("a/run.json").read_text())["status"] == "finished"


def test_a_folder_that_is_removed_in_mid_run_is_made_again(
    whole: dict[str, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        in_mid_run(2, lambda: shutil.rmtree("a"), patch)
        train("--out", "a", epochs=3)
    assert "'a' was removed or emptied" in said_by(capsys)
    assert [row["epoch"] for row in rows("a")] == [1, 2, 3]
    left = {name: data for name, data in whole.items() if name != "samples/epoch_0002.png"}
    assert made(Path("a")) == left
    Path("a/before_after.png").unlink()
    assert run(["train", "--resume", "a"]) == 0  # it needs the prompts
    assert made(Path("a")) == left


@pytest.mark.parametrize(("stopped", "code"), [(False, 1), (True, 143)])
def test_a_run_whose_folder_another_run_has_taken_writes_nothing_there(
    stopped: bool, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("--out", "b", "--seed", "7", "--eval-images", "0", epochs=1)
    everything = {path: path.read_bytes() for path in Path("b").rglob("*") if path.is_file()}

    def removed_and_begun_again() -> None:
        shutil.rmtree("a")
        Path("b").rename("a")
        if stopped:
            os.kill(os.getpid(), signal.SIGTERM)

    in_mid_run(1, removed_and_begun_again, monkeypatch)
    train("--out", "a", "--eval-images", "0", epochs=3, code=code)
    said = said_by(capsys)
    assert "'a' was removed, and another run works there now; begin again" in said and "--resume" not in said
    assert {
        Path("b") / path.relative_to("a"): path.read_bytes() for path in Path("a").rglob("*") if path.is_file()
    } == (everything)


def test_stopping_a_run_whose_folder_is_gone_does_not_say_how_to_resume_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_and_stop() -> None:
        shutil.rmtree("a")
        os.kill(os.getpid(), signal.SIGTERM)

    in_mid_run(1, remove_and_stop, monkeypatch)
    train("--out", "a", epochs=3, code=143)
    said = said_by(capsys)
    assert "stopped: 'a' was removed, with all that was saved in it; begin again" in said and "--resume" not in said


@pytest.mark.parametrize("jump", [-3600.0, pytest.param(3600.0, marks=pytest.mark.slow)])
def test_a_clock_that_is_set_in_mid_run_changes_nothing(
    jump: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the time that a scheduler gives, too: the epoch under way is still saved."""
    progress, real, moved = TrainingRun._progress, time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + moved[0])

    def set_clock(self: TrainingRun, phase: str, done: int, total: int, **reward: float) -> None:
        if self.epoch == 1 and phase == "sampling" and not moved[0]:
            if self.config.save_within:
                os.kill(os.getpid(), signal.SIGTERM)
            moved[0] = jump
        progress(self, phase, done, total, **reward)

    monkeypatch.setattr(TrainingRun, "_progress", set_clock)
    train("--out", "a", "--json")
    assert 0 < json.loads(capsys.readouterr().out)["run"]["seconds"] < 600
    moved[0] = 0.0
    train("--out", "b", "--save-within", "300s", epochs=9, code=143)
    assert json.loads(Path("b/run.json").read_text())["epochs_done"] == 2
    seconds = [value for row in rows("a") + rows("b") for name, value in row.items() if name.startswith("seconds")]
    assert len(seconds) == 16 and all(0 <= value < 600 for value in seconds)


def test_a_loss_of_nan_changes_no_weight_is_counted_and_ends_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lost = DDPO._loss, []

    def loss(self: DDPO, *about: Any) -> Any:
        value, *rest = real(self, *about)
        lost.append(self.optimisation.updates >= 2)
        return (value * float("nan") if lost[-1] else value, *rest)

    monkeypatch.setattr(DDPO, "_loss", loss)
    train("--out", "a", "--eval-images", "0", "--save-every", "1", epochs=9, code=1)
    said = said_by(capsys)
    assert "epoch 2: 2 updates were passed over: their gradient was not finite" in said
    assert (
        "not finite: 5 in a row, or more than a third of the last ones; begin a new run with --config a/config.toml "
        "--init-lora a/adapter, and use --precision fp32 or bf16, or a lower --lr" in said
    )
    assert [row.get("skipped_updates") for row in rows("a")] == [None, 2, 2]
    assert "NaN" not in Path("a/metrics.jsonl").read_text()
    is_whole(Path("a"), 3)  # the fourth epoch did not end
    good, last = (safetensors.torch.load_file(f"a/checkpoints/epoch_{epoch:04d}/state.safetensors") for epoch in (1, 3))
    assert good.keys() == last.keys() and all(torch.equal(good[name], last[name]) for name in good)
