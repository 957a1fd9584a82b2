"""What an unfinished epoch has drawn is found again, and taken where it is what would be drawn."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import adapter, rows, train, without_seconds

from texforce_cli.algorithms import ddpo
from texforce_cli.cli.app import run
from texforce_cli.core.seeds import derive
from texforce_cli.diffusion.sampler import Trajectory
from texforce_cli.errors import Interrupted, TexforceError
from texforce_cli.files import NotWritten
from texforce_cli.team.processes import Processes
from texforce_cli.workflows import drafts
from texforce_cli.workflows.drafts import Drafts
from texforce_cli.workflows.learner import follow
from texforce_cli.workflows.run_folder import RunFolder, versions
from texforce_cli.workflows.stopping import StopRequest
from texforce_cli.workflows.training_run import TrainingRun

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RunFolder(Path()).record.write_text('{"config": {}, "id": "a"}')


def batch(first: int = 0, count: int = 2, *, unconditional: bool = True) -> Trajectory:
    """Two steps of images whose seeds are their numbers."""
    generator = torch.Generator().manual_seed(first)
    latents = torch.randn((3, count, 4, 2, 2), generator=generator)
    log_probs = torch.randn((2, count), generator=generator)
    log_probs[1] = torch.nan
    pictures = np.arange(count * 48, dtype=np.uint8).reshape(count, 3, 4, 4).transpose(0, 2, 3, 1)
    seeds = tuple(range(first, first + count))
    kept = latents[1:].to(torch.bfloat16) if unconditional else None
    return Trajectory(tuple(f"prompt {seed}" for seed in seeds), seeds, latents, log_probs, kept, pictures)


def asked(*seeds: int) -> dict[int, str]:
    return {seed: f"prompt {seed}" for seed in seeds or range(6)}


def drafts_of(run: str = "a", seconds: float = 60.0) -> Drafts:
    return Drafts(RunFolder(Path(), run), seconds, "cpu")


@pytest.mark.parametrize("unconditional", [True, False])
def test_a_batch_is_the_same_bits_again(unconditional: bool) -> None:
    ours, drawn = drafts_of(), batch(4, unconditional=unconditional)
    ours.keep(0, 4, drawn)
    assert not Path("drawn").exists()  # not a minute later
    ours.save()
    assert ours.count() == 2
    [again] = drafts_of().found(0, asked(), CPU)
    assert (again.prompts, again.seeds) == (drawn.prompts, drawn.seeds)
    assert torch.equal(again.latents, drawn.latents)
    assert torch.equal(again.log_probs.view(torch.int32), drawn.log_probs.view(torch.int32))
    assert (again.unconditional is None) is not unconditional
    if again.unconditional is not None and drawn.unconditional is not None:
        assert again.unconditional.dtype is torch.bfloat16 and torch.equal(again.unconditional, drawn.unconditional)
    assert (again.images == drawn.images).all()


def test_only_what_would_be_drawn_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeds(epoch: int = 0, prompts: Mapping[int, str] = asked(), ours: Drafts = drafts_of()) -> list[int]:
        return [seed for drawn in ours.found(epoch, prompts, CPU) for seed in drawn.seeds]

    ours = drafts_of()
    ours.keep(0, 0, batch())
    ours.save()
    assert seeds() == [0, 1] and ours.count() == 2
    assert seeds(1) == []  # another epoch
    assert seeds(prompts=asked(0, 7, 2)) == [0]
    assert seeds(prompts={**asked(), 1: "another"}) == [0]
    assert seeds(ours=drafts_of("b")) == [] and drafts_of("b").count() == 0
    assert seeds(ours=Drafts(RunFolder(Path(), "a"), 60.0, "cpu", compiled=True)) == []
    with monkeypatch.context() as patch:
        patch.setattr(drafts, "versions", lambda: {**versions(), "diffusers": "0.1"})
        assert seeds(ours=drafts_of()) == []
    [path] = Path("drawn").rglob("*.safetensors")
    whole = path.read_bytes()
    for damaged in (b"", whole[:-9], b"x" * 64, whole.replace(b"texforce", b"texfarce")):
        path.write_bytes(damaged)
        assert seeds() == []


def test_each_process_finds_its_images_whichever_has_drawn_them() -> None:
    for first in (0, 3):
        one = drafts_of()  # of three images, by a process each
        one.keep(0, first, batch(first, 3))
        one.save()
    parts = list(drafts_of().found(0, asked(1, 2, 3, 5, 7), CPU))
    assert [part.seeds for part in parts] == [(1, 2), (3, 5)]
    drawn = batch(3, 3)
    assert parts[1].prompts == ("prompt 3", "prompt 5")
    assert torch.equal(parts[1].latents, drawn.latents[:, [0, 2]])
    assert (parts[1].images == drawn.images[[0, 2]]).all()


def test_nothing_is_written_where_the_run_is_not() -> None:
    """On another machine's disk, or in a folder that another run has taken."""
    record = RunFolder(Path()).record
    for text in (None, '{"config": {}, "id": "b"}'):
        record.unlink() if text is None else record.write_text(text)
        ours = drafts_of(seconds=1e-9)
        ours.keep(0, 0, batch())
        assert not Path("drawn").exists() and not ours.warnings()
    record.write_text('{"config": {}, "id": "a"}')
    ours.save()
    assert ours.count() == 2


def test_it_is_written_when_the_seconds_have_passed_and_forgotten_with_its_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(drafts.time, "monotonic", lambda: now[0])
    ours = drafts_of()
    assert not list(ours.found(0, asked(), CPU))  # the epoch begins
    for first, seconds in ((0, 40), (2, 21), (4, 59)):
        now[0] += seconds
        ours.keep(0, first, batch(first))
    assert sorted(path.name for path in Path("drawn").rglob("*.*")) == [
        "images_000000.safetensors",
        "images_000002.safetensors",
    ]
    ours.all_drawn()  # of an epoch that takes long, the rest too
    assert ours.count() == 6
    ours.clear(but=1)
    assert not Path("drawn").exists()
    assert not list(ours.found(1, asked(), CPU))
    ours.keep(1, 0, batch())
    ours.all_drawn()  # a short one
    ours.save()
    assert not Path("drawn").exists()


def test_a_full_disk_is_told_once_and_costs_the_run_and_other_processes_nothing() -> None:
    resource = pytest.importorskip("resource")
    ours, other = drafts_of(seconds=1e-9), drafts_of()
    ours.keep(0, 0, batch())
    other.keep(0, 6, batch(6))
    other.save()
    assert ours.count() == 4
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))  # a write breaks off in its middle
    try:
        ours.keep(0, 2, batch(2))
        ours.keep(0, 4, batch(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = ["what the epoch has drawn cannot be kept in 'drawn': an interruption may cost the whole epoch"]
    assert [ours.warnings(), ours.warnings()] == [said, []]
    assert [path.name for path in Path("drawn").rglob("*.*")] == ["images_000006.safetensors"]


def test_time_that_is_over_costs_nothing_of_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alarm of --save-within comes while a batch is written; the last saving after it is not broken off."""
    written, write_bytes = list[Path](), drafts.write_bytes

    def slow(path: Path, data: bytes) -> None:
        written.append(path)
        time.sleep(0.5 if len(written) == 1 else 0.0)
        write_bytes(path, data)

    monkeypatch.setattr(drafts, "write_bytes", slow)
    ours, asked = drafts_of(), StopRequest(grace=0.2)
    for first in (0, 2):
        ours.keep(0, first, batch(first))
    with asked.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            ours.save()
    ours.save()
    assert ours.count() == 4 and not ours.warnings()
    ours.keep(0, 4, batch(4))
    written.clear()
    with asked.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            asked.check()
        ours.save()
    assert ours.count() == 6


def test_nothing_is_kept_where_nothing_is_asked_to_be() -> None:
    ours = drafts_of(seconds=0.0)
    ours.keep(0, 0, batch())
    ours.save()
    assert not Path("drawn").exists()


@pytest.mark.parametrize(
    ("phase", "every", "kept"), [("sampling", "120", 4), ("training", "1e-9", 8), ("training", "120", 0)]
)
def test_a_resumed_epoch_draws_only_what_is_missing_and_ends_with_the_same_bits(
    phase: str, every: str, kept: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--guidance", "2", "--uncond-embedding", "snapshot", "--draft-every", every, "--eval-images", "0"]
    train("--out", "whole", *options, epochs=2)
    progress, real, drawn = TrainingRun._progress, ddpo.rollout, []

    def interrupted(self: TrainingRun, phase_now: Any, done: int, total: int, **reward: float) -> None:
        if self.epoch == 1 and phase_now == phase:
            os.kill(os.getpid(), signal.SIGTERM)
        progress(self, phase_now, done, total, **reward)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_progress", interrupted)
        train("--out", "parts", *options, epochs=2, code=143)
    more = f" and {kept} images of the next" if kept else ""
    assert f"1 of 2 epochs{more} are saved in 'parts'" in " ".join(capsys.readouterr().err.split())

    def counted(policy: Any, prompts: Any, seeds: Any) -> Trajectory:
        drawn.extend(seeds)
        return real(policy, prompts, seeds)

    monkeypatch.setattr(ddpo, "rollout", counted)
    assert run(["train", "--resume", "parts"]) == 0
    preflight = 8
    assert len(drawn) == preflight + 8 - kept
    assert adapter("parts") == adapter("whole")
    assert without_seconds("parts") == without_seconds("whole")
    assert not Path("parts/drawn").exists()


def test_a_reward_that_fails_costs_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    score, calls = ddpo.DDPO._score, []

    def broken(self: ddpo.DDPO, *about: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise TexforceError("the reward is broken", "mend it")
        return score(self, *about)

    with monkeypatch.context() as patch:
        patch.setattr(ddpo.DDPO, "_score", broken)
        train("--out", "a", "--eval-images", "0", epochs=1, code=1)
    assert sorted(path.name for path in Path("a/drawn").rglob("*.safetensors")) == [
        "images_000000.safetensors",
        "images_000004.safetensors",
    ]
    assert run(["train", "--resume", "a"]) == 0
    assert len(rows("a")) == 1 and json.loads(Path("a/run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("breaks", [False, True])
def test_what_cannot_be_kept_is_told_at_the_end_of_the_epoch(
    breaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*about: Any) -> None:
        raise NotWritten("no space left on the disk", "free some space")

    monkeypatch.setattr(drafts, "write_bytes", full)
    if breaks:
        monkeypatch.setattr(ddpo.DDPO, "_learn", full)
    train("--out", "a", "--eval-images", "0", "--draft-every", "1e-9", epochs=1, code=int(breaks))
    said = " ".join(capsys.readouterr().err.split())
    sentence = "what the epoch has drawn cannot be kept in 'a/drawn': an interruption may cost the whole epoch"
    assert said.count(sentence) == 1
    assert (f"epoch 1: {sentence}" in said) is not breaks  # as those of the other processes are


SECOND = {derive(0, "image", 1, index) for index in range(16)}
"""The images of the second epoch."""


def slow(place: Processes) -> Any:
    """What a process that follows does, but each pass of its second batch of the second epoch takes three seconds."""
    real, batches = ddpo.rollout, list[int]()

    def drawn(policy: Any, prompts: Any, seeds: Any) -> Trajectory:
        batches.extend(SECOND & {*seeds})
        if len(batches) > 4:
            policy.passed = functools.partial(after, 3.0, policy.passed)
            Path("slow").touch()
        return real(policy, prompts, seeds)

    ddpo.rollout = drawn
    return follow(place)


def after(seconds: float, work: Callable[[], None]) -> None:
    time.sleep(seconds)
    work()


def noting(place: Processes) -> Any:
    """What a process that follows does, noting which images it draws."""
    ddpo.rollout = noted(ddpo.rollout)
    return follow(place)


def noted(real: Any) -> Any:
    def drawn(policy: Any, prompts: Any, seeds: Any) -> Trajectory:
        with Path(f"drawn-{os.getpid()}").open("a") as file:
            file.writelines(f"{seed}\n" for seed in seeds if seed in SECOND)
        return real(policy, prompts, seeds)

    return drawn


def drawn_by_process() -> list[list[int]]:
    """The images of the second epoch that each process has drawn since this was called last."""
    found = []
    for path in Path().glob("drawn-*"):
        found.append([int(line) for line in path.read_text().split()])
        path.unlink()
    return found


@pytest.mark.slow
def test_several_processes_draw_only_what_none_of_them_had_and_end_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first of two is asked to stop while the other one is in the middle of its second batch."""
    options = ["--samples-per-epoch", "16", "--eval-images", "0", "--num-processes", "2"]
    train("--out", "whole", *options)
    progress, follows = TrainingRun._progress, "texforce_cli.workflows.train.follow"

    def interrupted(self: TrainingRun, phase: Any, done: int, total: int, **reward: float) -> None:
        if self.epoch == 1 and phase == "sampling":
            while not Path("slow").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
        progress(self, phase, done, total, **reward)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_progress", interrupted)
        patch.setattr(follows, slow)
        train("--out", "parts", *options, code=143)
    assert "1 of 2 epochs and at least 4 images of the next are saved" in " ".join(capsys.readouterr().err.split())
    assert Drafts(RunFolder.open("parts"), 0.0, "cpu").count() == 8  # a batch of each
    shutil.copytree("parts", "by_one")
    monkeypatch.setattr(follows, noting)
    monkeypatch.setattr(ddpo, "rollout", noted(ddpo.rollout))
    assert run(["train", "--resume", "parts"]) == 0
    ours, theirs = drawn_by_process()
    assert len(ours) == len(theirs) == 4 and not {*ours} & {*theirs}
    assert adapter("parts") == adapter("whole")
    assert without_seconds("parts") == without_seconds("whole")
    assert not Path("parts/drawn").exists()
    assert run(["train", "--resume", "by_one", "--num-processes", "1"]) == 0
    assert [sorted(seeds) for seeds in drawn_by_process()] == [sorted(ours + theirs)]
    assert rows("by_one")[1]["reward_mean"] == pytest.approx(rows("whole")[1]["reward_mean"], rel=1e-4)
