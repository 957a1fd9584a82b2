"""What an unfinished epoch has drawn is found again, and taken where it is what would be drawn."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import adapter, rows, train, without_seconds

from texforce_cli.algorithms import ddpo
from texforce_cli.cli.app import run
from texforce_cli.diffusion.sampler import Trajectory
from texforce_cli.errors import Interrupted, TexforceError
from texforce_cli.workflows import drafts
from texforce_cli.workflows.drafts import Drafts
from texforce_cli.workflows.stopping import StopRequest
from texforce_cli.workflows.training_run import TrainingRun

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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


def asked(first: int, count: int = 6) -> tuple[list[int], list[str]]:
    return list(range(first, first + count)), [f"prompt {seed}" for seed in range(first, first + count)]


@pytest.mark.parametrize("unconditional", [True, False])
def test_a_batch_is_the_same_bits_again(unconditional: bool) -> None:
    ours, drawn = Drafts(Path("drawn"), 60.0, {"torch": "1"}), batch(4, unconditional=unconditional)
    ours.keep(0, 4, drawn)
    assert not Path("drawn").exists()  # not a minute later
    assert ours.save() == 2
    again = Drafts(Path("drawn"), 60.0, {"torch": "1"}).take(0, 4, *asked(4), CPU)
    assert again is not None and (again.prompts, again.seeds) == (drawn.prompts, drawn.seeds)
    assert torch.equal(again.latents, drawn.latents)
    assert torch.equal(again.log_probs.view(torch.int32), drawn.log_probs.view(torch.int32))
    assert (again.unconditional is None) is not unconditional
    if again.unconditional is not None and drawn.unconditional is not None:
        assert again.unconditional.dtype is torch.bfloat16 and torch.equal(again.unconditional, drawn.unconditional)
    assert (again.images == drawn.images).all()


def test_only_what_would_be_drawn_is_taken() -> None:
    ours = Drafts(Path("drawn"), 60.0, {"torch": "1"})
    ours.keep(0, 0, batch())
    ours.save()
    assert ours.take(0, 0, *asked(0), CPU) is not None
    seeds, prompts = asked(0)
    assert ours.take(1, 0, seeds, prompts, CPU) is None  # another epoch
    assert ours.take(0, 2, seeds, prompts, CPU) is None  # another place in it
    assert ours.take(0, 0, [0, 7, 2], prompts, CPU) is None
    assert ours.take(0, 0, seeds, ["prompt 0", "another"], CPU) is None
    assert ours.take(0, 0, seeds[:1], prompts[:1], CPU) is None  # more images than are asked for
    assert Drafts(Path("drawn"), 60.0, {"torch": "2"}).take(0, 0, seeds, prompts, CPU) is None
    [path] = Path("drawn").rglob("*.safetensors")
    whole = path.read_bytes()
    for damaged in (b"", whole[:-9], b"x" * 64, whole.replace(b"texforce", b"texfarce")):
        path.write_bytes(damaged)
        assert ours.take(0, 0, seeds, prompts, CPU) is None


def test_it_is_written_when_the_seconds_have_passed_and_forgotten_with_its_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(drafts.time, "monotonic", lambda: now[0])
    ours = Drafts(Path("drawn"), 60.0, {})
    assert ours.take(0, 0, *asked(0), CPU) is None  # the epoch begins
    for first, seconds in ((0, 40), (2, 21), (4, 59)):
        now[0] += seconds
        ours.keep(0, first, batch(first))
    assert sorted(path.name for path in Path("drawn").rglob("*.*")) == [
        "images_000000.safetensors",
        "images_000002.safetensors",
    ]
    ours.all_drawn()  # of an epoch that takes long, the rest too
    assert ours.save() == 6
    ours.clear(but=1)
    assert not Path("drawn").exists()
    assert ours.take(1, 0, *asked(0), CPU) is None
    ours.keep(1, 0, batch())
    ours.all_drawn()  # a short one
    assert ours.save() == 0 and not Path("drawn").exists()


def test_a_full_disk_is_told_once_and_costs_the_run_nothing() -> None:
    resource, said = pytest.importorskip("resource"), list[str]()
    ours = Drafts(Path("drawn"), 1e-9, {}, said.append)
    ours.keep(0, 0, batch())
    assert list(Path("drawn").rglob("*.safetensors"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))  # a write breaks off in its middle
    try:
        ours.keep(0, 2, batch(2))
        ours.keep(0, 4, batch(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said == ["what the epoch has drawn cannot be kept in 'drawn': an interruption costs the whole epoch"]
    assert not Path("drawn").exists()


def test_time_that_is_over_costs_nothing_of_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alarm of --save-within comes while a batch is written; the last saving after it is not broken off."""
    said, written, write_bytes = list[str](), list[Path](), drafts.write_bytes

    def slow(path: Path, data: bytes) -> None:
        written.append(path)
        time.sleep(0.5 if len(written) == 1 else 0.0)
        write_bytes(path, data)

    monkeypatch.setattr(drafts, "write_bytes", slow)
    ours, asked = Drafts(Path("drawn"), 60.0, {}, said.append), StopRequest(grace=0.2)
    for first in (0, 2):
        ours.keep(0, first, batch(first))
    with asked.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            ours.save()
    assert ours.save() == 4 and not said
    ours.keep(0, 4, batch(4))
    written.clear()
    with asked.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            asked.check()
        assert ours.save() == 6


def test_nothing_is_kept_where_nothing_is_asked_to_be() -> None:
    ours = Drafts(Path("drawn"), 0.0, {})
    ours.keep(0, 0, batch())
    assert ours.save() == 0 and not Path("drawn").exists()


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
