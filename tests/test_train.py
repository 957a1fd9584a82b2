"""`texforce train` through the real command, on the embedded model at its smallest settings."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from small_models import small_pipeline

from texforce_cli import tiny
from texforce_cli.cli.app import run
from texforce_cli.lora.read import FILE_NAME
from texforce_cli.workflows import checkpoint, plan

SMALL = (
    "--samples-per-epoch 8 --group-size 4 --micro-batch 4 --grad-accum 1 --steps 3 --train-steps first:2 "
    "--eval-images 4 --eval-every 2"
).split()


def train(*arguments: str, code: int = 0, reward: str = "brightness", epochs: int = 2) -> None:
    command = ["train", "--reward", reward, "--model", "tiny", *SMALL, "--epochs", str(epochs), *arguments]
    assert run(command) == code


def adapter(run_folder: str | Path) -> bytes:
    return (Path(run_folder) / "adapter" / FILE_NAME).read_bytes()


def rows(run_folder: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run_folder) / "metrics.jsonl").read_text().splitlines()]


def without_seconds(run_folder: str | Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows(run_folder)]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_leaves_a_folder_that_explains_itself() -> None:
    train("--seed", "3", "--prompts", "color", epochs=3)
    folder = Path("runs/brightness-tiny-1")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "run.json", "config.toml", "prompts.jsonl", "metrics.jsonl", "evaluations.jsonl", "curve.png", "before_after.png",
        "samples/epoch_0002.png", "samples/epoch_0003.png", f"adapter/{FILE_NAME}", "adapter/README.md",
        "checkpoints/epoch_0003/state.safetensors",
    } <= names  # fmt: skip
    assert not any(".tmp" in name for name in names)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" and record["epochs_done"] == 3
    assert record["config"]["seed"] == 3 and record["origins"]["seed"] == "flag"
    assert record["origins"]["guidance"] == "preset tiny" and record["origins"]["eta"] == "default"
    assert record["model"]["sha256"] and record["versions"]["torch"]
    assert record["prompts"]["seen"] == 29 and record["preflight"]["steps"]
    assert len((folder / "prompts.jsonl").read_text().splitlines()) == 39
    found = rows(folder)
    assert [row["epoch"] for row in found] == [1, 2, 3]
    expected = {
        "reward_mean", "reward_std", "terms", "approx_kl", "clip_fraction", "ratio_error", "grad_norm", "learning_rate",
        "seconds_sampling", "seconds_rewards", "seconds_training", "images_per_second",
    }  # fmt: skip
    assert all(expected <= set(row) for row in found)
    assert all(row["ratio_error"] < 2e-5 and row["grad_norm"] > 0 for row in found)
    header = safetensors.safe_open(folder / "adapter" / FILE_NAME, "pt").metadata()
    about = json.loads(header["texforce"])
    assert about["base"] == "tiny" and about["rewards"] == ["brightness"] and about["images"] == 24
    assert header["ss_network_dim"] == "4" and header["modelspec.architecture"]
    assert "brightness" in (folder / "adapter" / "README.md").read_text()
    assert run(["train", "--config", str(folder / "config.toml")]) == 0
    assert adapter("runs/brightness-tiny-2") == adapter(folder)


def test_the_same_command_gives_the_same_bits_and_another_seed_others() -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        train("--seed", seed, "--out", name)
    assert adapter("a") == adapter("b")
    assert without_seconds("a") == without_seconds("b")
    assert adapter("a") != adapter("c")


def test_several_threads_give_the_same_bits_each_time() -> None:
    command = [
        sys.executable,
        "-m",
        "texforce_cli",
        "train",
        "--reward",
        "brightness",
        "--model",
        "tiny",
        "--steps",
        "4",
    ]
    command += (
        "--samples-per-epoch 32 --micro-batch 32 --grad-accum 1 --timestep-batch 2 --epochs 3 --eval-images 0".split()
    )
    for name in ("a", "b"):
        subprocess.run([*command, "--out", name], env={**os.environ, "OMP_NUM_THREADS": "2"}, check=True)
    assert adapter("a") == adapter("b")
    assert without_seconds("a") == without_seconds("b")


def test_batch_size_does_not_change_which_noise_an_image_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    from texforce_cli.diffusion.sampler import Trajectory

    drawn: list[Trajectory] = []
    join = Trajectory.join.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Trajectory, "join", classmethod(lambda cls, parts: drawn.append(join(cls, parts)) or drawn[-1]))
    train("--out", "a", "--micro-batch", "4", "--grad-accum", "2", "--eval-images", "0", epochs=1)
    train("--out", "b", "--micro-batch", "2", "--grad-accum", "4", "--eval-images", "0", epochs=1)
    first, second = drawn[1], drawn[3]  # each run draws its preflight before
    assert first.seeds == second.seeds
    assert torch.equal(first.latents[0], second.latents[0])
    assert rows("a")[0]["reward_mean"] == pytest.approx(rows("b")[0]["reward_mean"], abs=1e-3)


RESUMED = {
    "plain": [],
    "everything": "--ema 0.9 --lr-schedule constant --warmup 0.3 --advantages prompt --kl 0.1 --kl-target 1e-7 --guidance 2 "
    "--uncond-embedding snapshot --train-steps random:0.5 --train both --init-lora first --prompts one.txt".split(),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from texforce_cli.workflows.training_run import TrainingRun

    if kind == "everything":
        Path("one.txt").write_text("a cat\n")  # so that its tracker has enough rewards to matter
        train("--train", "both", "--out", "first", "--rank", "2", epochs=1)
    train("--out", "whole", *RESUMED[kind], epochs=4)
    progress, calls = TrainingRun._progress, []

    def interrupted(self: TrainingRun, phase: str, done: int, total: int, **reward: float) -> None:
        calls.append(phase)
        if self.epoch == 2 and phase == "training":
            os.kill(os.getpid(), signal.SIGTERM)  # in the middle of the third epoch
        progress(self, phase, done, total, **reward)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_progress", interrupted)
        train("--out", "parts", *RESUMED[kind], epochs=4, code=143)
    assert json.loads(Path("parts/run.json").read_text())["status"] == "interrupted"
    assert len(rows("parts")) == 2
    assert run(["train", "--resume", "parts"]) == 0
    assert adapter("parts") == adapter("whole")
    assert without_seconds("parts") == without_seconds("whole")
    assert Path("parts/evaluations.jsonl").read_bytes() == Path("whole/evaluations.jsonl").read_bytes()
    assert run(["train", "--resume", "parts"]) == 0  # finished already: nothing to do, nothing lost
    assert adapter("parts") == adapter("whole")


def test_checkpoints_keep_the_last_two_the_best_and_every_kth(capsys: pytest.CaptureFixture[str]) -> None:
    train("--save-every", "3", "--eval-images", "0", "--out", "a", epochs=7)
    kept = {int(path.name[6:]) for path in Path("a/checkpoints").iterdir()}
    best = 1 + int(np.argmax([row["reward_mean"] for row in rows("a")[1:]]))  # an epoch draws by the weights before
    assert kept == {3, 6, 7, best} and json.loads(Path("a/run.json").read_text())["best_epoch"] == best
    assert run(["sample", "a cat", "--lora", "a/checkpoints/epoch_0003:0.5", "--out", "p", "--steps", "2"]) == 0


def test_a_damaged_checkpoint_is_passed_over_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    train("--out", "whole", epochs=3)
    train("--out", "hurt", epochs=3)
    for path in Path("hurt/checkpoints").glob("epoch_0003/state.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    capsys.readouterr()
    assert run(["train", "--resume", "hurt"]) == 0
    assert "'hurt/checkpoints/epoch_0003' is damaged" in capsys.readouterr().err.replace("\\", "/")
    assert adapter("hurt") == adapter("whole")
    for path in Path("hurt/checkpoints").glob("*/state.json"):
        path.write_text("{")
    assert run(["train", "--resume", "hurt"]) == 0
    assert "no whole checkpoint: beginning again" in capsys.readouterr().err
    assert adapter("hurt") == adapter("whole")


def test_a_run_is_not_resumed_with_other_options(capsys: pytest.CaptureFixture[str]) -> None:
    train("--out", "a", epochs=1)
    assert run(["train", "--resume", "a", "--lr", "0.5", "--rank", "4", "--device", "auto", "--model", "tiny"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "begun with other options: lr (0.01 -> 0.5); resume without them" in error
    Path("b.toml").write_text("steps = 4\n")
    assert run(["train", "--resume", "a", "--config", "b.toml"]) == 2
    assert "steps (3 -> 4)" in capsys.readouterr().err
    assert run(["train", "--resume", "nowhere"]) == 2
    assert "is no run folder" in capsys.readouterr().err
    for hurt in ("{", "[" * 100_000):
        Path("a/run.json").write_text(hurt)
        assert run(["train", "--resume", "a"]) == 1
        assert "is damaged" in capsys.readouterr().err


def test_what_does_not_change_the_result_may_change_when_a_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    train("--out", "a", "--device", "cpu", epochs=1)
    Path("b.toml").write_text("reward_host = []\n")
    free = "--keep 3 --save-every 4 --reward-workers 2 --reward-timeout 9 --reward-memory 8 --micro-batch auto --device auto"
    assert run(["train", "--resume", "a", *free.split(), "--config", "b.toml"]) == 0
    record = json.loads(Path("a/run.json").read_text())
    assert (record["config"]["keep"], record["config"]["reward_timeout"], record["origins"]["keep"]) == (
        3,
        9.0,
        "resume",
    )
    capsys.readouterr()
    assert run(["train", "--resume", "a", "--dry-run", "--json", "--save-within", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["config"]["save_within"] == 5
    assert run(["train", "--resume", "a", "--dry-run", "--lr", "1"]) == 2
    record["config"]["device"] = "cuda"
    Path("a/run.json").write_text(json.dumps(record))
    assert run(["train", "--resume", "a", "--device", "cpu"]) == 2
    assert "device (cuda -> cpu)" in capsys.readouterr().err


def test_a_gpu_may_be_another_one_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    from texforce_cli.config import TrainConfig
    from texforce_cli.workflows import train as workflow
    from texforce_cli.workflows.run_folder import RunFolder

    monkeypatch.setattr(workflow, "resolve_device", torch.device)
    config = TrainConfig(device="cuda:0")
    assert workflow._unchanging(RunFolder(Path("a")), config, {"micro_batch": "default"}, {"device": "cuda:1"}) == {
        "device": "cuda:1"
    }


@pytest.mark.parametrize(
    ("there", "remedy"),
    [
        (["cuda:0 (a GPU)", "cuda:1 (full)", "cpu"], "say --device cuda:0, or begin"),
        (
            ["cuda:1 (full)", "cpu"],
            "resume it where it is, or begin a new run with --config a/config.toml --device auto",
        ),
    ],
)
def test_a_gpu_that_is_not_here_has_a_remedy_that_can_be_followed(
    there: list[str], remedy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from texforce_cli.workflows import train as workflow

    train("--out", "a", epochs=1)
    record = json.loads(Path("a/run.json").read_text())
    record["config"]["device"] = "cuda:1"
    Path("a/run.json").write_text(json.dumps(record))
    monkeypatch.setattr(workflow, "present", lambda: there)
    assert run(["train", "--resume", "a"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "begun on a device that cannot be used: the device 'cuda:1' is not available here" in said and remedy in said
    assert run(["train", "--config", "a/config.toml", "--device", "auto", "--out", "b", "--dry-run"]) == 0


def test_a_full_memory_proposes_nothing_that_a_resumed_run_refuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from texforce_cli.workflows.learner import Learner

    def full(learner: Learner) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Learner, "preflight", full)
    train("--out", "a", code=1)
    said = " ".join(capsys.readouterr().err.split())
    assert "begin a new run with --config a/config.toml, and use --gradient-checkpointing or" in said
    assert "--micro-batch" not in said.partition("the memory of")[2]


def test_rewards_that_never_vary_stop_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from texforce_cli.rewards.builtin.pictures import Brightness

    monkeypatch.setattr(Brightness, "score", lambda self, images, prompts, metadata: [0.5] * len(images))
    train("--out", "a", epochs=9, code=1)
    error = " ".join(capsys.readouterr().err.split())
    assert "epoch 1: the rewards of this epoch did not vary" in error
    assert "did not vary in 3 epochs in a row" in error
    anew = "--config a/config.toml --init-lora a/adapter"
    assert f"begin a new run with {anew}, and use another --reward" in error
    assert run(["train", *anew.split(), "--reward", "tiny-clip", "--dry-run"]) == 0
    assert run(["train", "--resume", "a", "--reward", "tiny-clip"]) == 2
    assert len(rows("a")) == 3


def test_a_reward_of_nan_stops_the_run_and_keeps_what_is_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from texforce_cli.rewards.builtin.pictures import Brightness

    real, calls = Brightness.score, []

    def sometimes(self: Brightness, images: Any, prompts: Any, metadata: Any) -> list[float]:
        calls.append(1)
        values = real(self, images, prompts, metadata)
        return values if len(calls) < 6 else [float("nan")] * len(values)

    monkeypatch.setattr(Brightness, "score", sometimes)
    train("--out", "a", "--eval-images", "0", epochs=9, code=1)
    assert "reward 'brightness' returned nan" in capsys.readouterr().err
    assert len(rows("a")) == 2
    assert json.loads(Path("a/run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ("_gradient_error", "torch.compile makes the gradient of this model wrong by 70%"),
        ("_log_prob", "with unchanged weights the ratio differs from 1"),
    ],
)
def test_a_run_that_would_learn_something_else_is_not_begun(
    broken: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from texforce_cli.algorithms.ddpo import DDPO
    from texforce_cli.diffusion.policy import Policy

    log_prob = DDPO._log_prob
    faults: dict[str, Any] = {
        "_gradient_error": lambda *drawn: 0.7,
        "_log_prob": lambda *about: (log_prob(*about)[0] + 0.01, log_prob(*about)[1]),
    }
    monkeypatch.setattr(Policy, "compile", lambda policy: setattr(policy, "compiled", broken == "_gradient_error"))
    monkeypatch.setattr(DDPO, broken, faults[broken])
    train("--out", "a", "--compile", epochs=1, code=1)
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not Path("a/adapter").exists()


def test_a_run_goes_on_where_the_ratio_has_drifted_and_without_a_compiler_that_is_another_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from texforce_cli.algorithms.ddpo import DDPO
    from texforce_cli.diffusion.policy import Policy

    monkeypatch.setattr(Policy, "compile", lambda policy: setattr(policy, "compiled", True))
    train("--out", "a", "--compile", "--eval-images", "0")
    shutil.rmtree("a/checkpoints/epoch_0002")
    log_prob = DDPO._log_prob
    monkeypatch.setattr(DDPO, "_log_prob", lambda *about: (log_prob(*about)[0] + 1e-4, log_prob(*about)[1]))
    with monkeypatch.context() as patch:
        patch.setattr(DDPO, "_gradient_error", lambda *drawn: 0.7)
        assert run(["train", "--resume", "a"]) == 1
    assert "go on with: texforce train --resume a --no-compile" in " ".join(capsys.readouterr().err.split())
    assert run(["train", "--resume", "a", "--no-compile"]) == 0
    assert "with unchanged weights the ratio differs from 1 by 1.0e-04" in " ".join(capsys.readouterr().err.split())
    assert len(rows("a")) == 2


def test_several_rewards_are_logged_each(capsys: pytest.CaptureFixture[str]) -> None:
    train("--reward", "jpeg-compressibility:0.5", "--normalize-rewards", "--out", "a", epochs=1)
    row = rows("a")[0]
    assert set(row["terms"]) == {"brightness", "jpeg-compressibility"}
    assert row["terms"]["jpeg-compressibility"]["mean"] < 0 < row["terms"]["brightness"]["mean"]
    terms = row["terms"]
    assert row["reward_mean"] == pytest.approx(
        terms["brightness"]["mean"] + 0.5 * terms["jpeg-compressibility"]["mean"]
    )


def test_an_epoch_has_what_rewards_counted_in_its_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from texforce_cli.rewards.builtin.pictures import Brightness

    real = Brightness.score

    def counting(self: Any, images: Any, prompts: Any, metadata: Any) -> list[float]:
        self.counts = {"seen": getattr(self, "counts", {"seen": 0})["seen"] + len(images)}
        return real(self, images, prompts, metadata)

    monkeypatch.setattr(Brightness, "score", counting)
    train("--out", "a", "--eval-every", "1", epochs=3)
    assert [row["reward_counts"] for row in rows("a")] == 3 * [{"brightness.seen": 8}]


def test_training_starts_from_a_lora() -> None:
    train("--out", "a", epochs=1)
    train("--out", "b", "--init-lora", "a:0.5", "--lr", "1e-12", "--weight-decay", "0", epochs=1)
    first, second = (safetensors.torch.load(adapter(name)) for name in "ab")
    assert set(first) == set(second)
    for key in (key for key in first if "lora_B" in key):
        a = key.replace("lora_B", "lora_A")
        assert torch.allclose(second[key] @ second[a], 0.5 * first[key] @ first[a], atol=1e-7)


def test_a_prompt_that_is_too_long_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.txt").write_text("a cat\n" + "a red dog and " * 12 + "a fox\n")
    train("--prompts", "p.txt", "--negative-prompt", "an ugly dog, " * 12, epochs=1)
    error = capsys.readouterr().err
    assert "tokens of the prompt 'a red dog and a red dog" in error
    assert "tokens of the prompt 'an ugly dog, an ugly dog" in error
    assert "[transformers]" not in error


def test_the_pictures_of_a_run_show_the_base_beside_the_current_model() -> None:
    train("--out", "a", "--lr", "0.05", epochs=2)
    shown = np.asarray(Image.open("a/before_after.png").convert("RGB")).astype(int)
    base, tuned = shown[29:157, 140:], shown[163:291, 140:]  # the first two rows of pictures
    assert base.std() > 20 and tuned.std() > 20
    assert np.abs(base - tuned).max() > 40


def test_json_is_one_document_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    train("--out", "a", "--json", epochs=2)
    document = json.loads(capsys.readouterr().out)
    assert document["texforce"] == 1
    assert document["run"]["epochs"] == 2 and document["run"]["adapter"] == str(Path("a/adapter"))
    assert document["run"]["evaluation"]["difference"]["n"] == 4


def test_a_dry_run_loads_nothing_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    command = "train --reward brightness --model sd15 --prompts color --dry-run --json --device cpu".split()
    assert run(command) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["config"]["preset"] == "phrase"
    assert plan["cost"]["images"] == 50 * 512
    assert plan["cost"]["unet_calls_sampling"] == 50 * 512 * 50 * 2
    assert plan["cost"]["unet_calls_training"] == 50 * 512 * 25 * 2
    assert plan["cost"]["computed_memory_gb"] > 4
    assert not list(Path().iterdir())


def test_the_memory_counts_the_denoising_steps_that_are_taken_together() -> None:
    flags = {"reward": ["brightness"], "model": "sd15", "device": "cpu", "micro_batch": 1}
    flags |= {"samples_per_epoch": 8, "grad_accum": 1}

    def memory(**more: Any) -> float:
        return plan.plan({**flags, **more}).cost()["computed_memory_gb"]

    one = memory()
    assert memory(timestep_batch=8) == pytest.approx(one + 7 * 3.14)
    assert (
        memory(timestep_batch=99) == memory(timestep_batch=25) == pytest.approx(one + 24 * 3.14)
    )  # those that are trained
    assert memory(timestep_batch="auto") == one  # a CPU takes them one at a time


def test_the_memory_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the weights and a pass to itself, and its share of an epoch's images; on a CPU the machine is one for all."""
    from texforce_cli.workflows import plan as planning

    monkeypatch.setattr(planning, "machine_memory_gb", lambda: 20.0)
    flags = {"reward": ["brightness"], "model": "sd15", "device": "cpu", "samples_per_epoch": 8, "grad_accum": 1}
    alone, two = planning.plan(flags), planning.plan({**flags, "num_processes": 2})
    assert (alone.config.micro_batch, two.config.micro_batch) == (4, 1)
    image = 51 * 16384 * 4 / 1e9
    assert two.cost()["computed_memory_gb"] == pytest.approx(4.28 + 3.14 + 4 * image)
    assert two.advice() == []
    monkeypatch.setattr(planning, "machine_memory_gb", lambda: 10.0)
    assert "about 14.9 GB of memory are needed by 2 processes at --micro-batch 1" in two.advice()[-1]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # two machines
    assert alone.cost()["computed_memory_gb"] == pytest.approx(4.28 + 4 * 3.14 + image)
    assert "about 67.4 GB of memory are needed by 4 processes at --micro-batch 4" in alone.advice()[-1]


@pytest.mark.parametrize(("train", "branches"), [("text-encoder", 1), ("unet", 2)])
def test_a_dry_run_counts_the_branch_that_is_kept_from_drawing_once(
    train: str, branches: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "train --reward brightness --model sd15 --prompts color --dry-run --json --device cpu".split()
    assert run([*command, "--uncond-embedding", "snapshot", "--train", train]) == 0
    cost = json.loads(capsys.readouterr().out)["plan"]["cost"]
    assert cost["unet_calls_sampling"] == 50 * 512 * 50 * 2
    assert cost["unet_calls_training"] == 50 * 512 * 25 * branches


def test_a_log_for_tensorboard(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    train("--out", "a", "--log", "tensorboard", epochs=1)
    assert list(Path("a/tensorboard").glob("events.*"))


def test_a_log_that_fails_is_told_once_and_ends_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from texforce_cli.workflows import loggers

    class Broken:
        def __init__(self, folder: Path) -> None:
            pass

        def log(self, row: dict[str, Any]) -> None:
            raise OSError(28, "No space left on device")

        close = log

    monkeypatch.setattr(loggers, "_TensorBoard", Broken)
    train("--out", "a", "--log", "tensorboard", epochs=2)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("--log tensorboard failed (OSError: [Errno 28] No space left on device)") == 1
    assert json.loads(Path("a/run.json").read_text())["status"] == "finished"


def without_a_reader() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full")
@pytest.mark.parametrize(
    ("opened", "colour"), [(lambda: os.open("/dev/full", os.O_WRONLY), ""), (without_a_reader, "1")]
)
def test_a_run_goes_on_where_nothing_can_be_said(
    opened: Callable[[], int], colour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", colour)
    with os.fdopen(opened(), "w", buffering=1) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        train("--out", "a", "--eval-images", "0", epochs=1)
    assert json.loads(Path("a/run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_at_a_safe_point_and_says_how_to_go_on(number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "texforce_cli", "train", "--reward", "brightness", "--model", "tiny", *SMALL]
    process = subprocess.Popen([*command, "--epochs", "500", "--out", "a"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(number)
    error = process.stderr.read()
    assert process.wait(60) == code
    assert "texforce train --resume a" in error and "Traceback" not in error
    done = json.loads(Path("a/run.json").read_text())["epochs_done"]
    assert len(rows("a")) == done >= 2


OPTIONS = [
    "--precision bf16 --clip-range 0.01",
    "--gradient-checkpointing --guidance 2",
    "--train unet --guidance 2 --uncond-embedding base",
    "--guidance 3 --uncond-embedding snapshot --negative-prompt night",
    "--advantages batch --adv-clip 1 --inner-epochs 2",
    "--advantages prompt --group-size 1",
    "--train-steps window:2 --eta 0.5",
    "--train-steps all --clip-convention joint --clip-range 1.64",
    "--lr-schedule linear --warmup 0.5 --weight-decay 0 --grad-norm 0.1",
    "--size 96 --rank 2 --alpha 8",
    "--prompts face --kl 0.1 --ema 0.5",
]


@pytest.mark.parametrize("options", [*OPTIONS, pytest.param("--compile", marks=pytest.mark.slow)])
def test_every_option_learns_something_finite(options: str) -> None:
    train("--out", "a", *options.split(), epochs=1)
    row = rows("a")[0]
    assert row["grad_norm"] > 0 and all(np.isfinite(row[key]) for key in ("approx_kl", "reward_mean", "grad_norm"))
    weights = safetensors.torch.load(adapter("a"))
    assert any(value.abs().max() > 0 for key, value in weights.items() if "lora_B" in key)


def test_a_second_ctrl_c_quits_at_once() -> None:
    command = [sys.executable, "-m", "texforce_cli", "train", "--reward", "brightness", "--model", "tiny", "--out", "a"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("preflight"):
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)  # two at once would be delivered as one; a batch takes longer than this
    process.send_signal(signal.SIGINT)
    error = process.stderr.read()
    assert process.wait(60) == 130
    assert "Traceback" not in error and "epochs are saved" not in error  # it did not wait for a safe point


@pytest.mark.parametrize(("grace", "saved"), [("60s", 3), ("0.3", 2)])
def test_a_scheduler_that_gives_time_gets_the_epoch_that_ends_within_it(
    grace: str, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from texforce_cli.workflows.training_run import TrainingRun

    progress, asked, write = TrainingRun._progress, [], checkpoint.save

    def slowly(*about: Any) -> None:
        time.sleep(0.2)
        write(*about)

    def interrupted(self: TrainingRun, phase: str, done: int, total: int, **reward: float) -> None:
        if self.epoch == 2 and phase == "sampling" and not asked:
            self.rows[-1]["seconds_total"] = 0.0
            assert 0.2 <= self._seconds_left("sampling") < 5  # the next one is to be written, too
            asked.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
            if grace == "0.3":
                time.sleep(20)  # a pass that takes long is broken off
        progress(self, phase, done, total, **reward)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_progress", interrupted)
        patch.setattr(checkpoint, "save", slowly)
        train("--out", "a", "--save-within", grace, "--eval-images", "0", epochs=9, code=143)
    assert grace != "0.3" or time.monotonic() - asked[0] < 10
    assert json.loads(Path("a/run.json").read_text())["epochs_done"] == saved


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarm on Windows")
def test_a_checkpoint_that_is_being_written_when_the_time_is_over_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint.save

    def slowly(*about: Any) -> None:
        os.kill(os.getpid(), signal.SIGALRM)
        write(*about)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", slowly)
        train("--out", "a", "--save-within", "30s", "--eval-images", "0", epochs=9, code=143)
    assert json.loads(Path("a/run.json").read_text())["epochs_done"] == 1
    assert Path("a/checkpoints/epoch_0001").is_dir()


def test_an_epoch_is_safe_before_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from texforce_cli.workflows.training_run import TrainingRun

    train("--out", "whole", epochs=4)
    progress = TrainingRun._progress

    def interrupted(self: TrainingRun, phase: str, done: int, total: int, **reward: float) -> None:
        if self.epoch == 2 and phase == "evaluation":
            os.kill(os.getpid(), signal.SIGTERM)
        progress(self, phase, done, total, **reward)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_progress", interrupted)
        train("--out", "parts", epochs=4, code=143)
    assert json.loads(Path("parts/run.json").read_text())["epochs_done"] == 2
    assert Path("parts/checkpoints/epoch_0002").is_dir()
    assert run(["train", "--resume", "parts"]) == 0
    assert adapter("parts") == adapter("whole")
    assert Path("parts/evaluations.jsonl").read_bytes() == Path("whole/evaluations.jsonl").read_bytes()


OTHERS = ["evaluations", "curve", "adapter/", "run", "before_after"]
FILES = ["epoch_0002", "metrics", "samples/", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


@pytest.mark.parametrize("where", FILES)
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    """Every file is flushed before it is renamed into place: there a full disk shows at the latest."""
    from texforce_cli import files

    real, written = os.fsync, []

    def full(handle: int) -> None:
        path = str(Path(f"/proc/self/fd/{handle}").readlink())
        written.append(path)
        saved = any("epoch_0001" in p for p in written)  # the first epoch
        if saved and f"/{where}" in path.replace("/.", "/"):
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        train("--out", "parts", epochs=3, code=1)
    said = " ".join(capsys.readouterr().err.split())
    assert "no space left on the disk to write 'parts/" in said and "Traceback" not in said
    assert list(Path("parts/checkpoints").glob("epoch_*"))
    assert json.loads(Path("parts/run.json").read_text())["status"] == ("failed" if where != "run" else "running")
    assert not list(Path("parts").rglob("*.tmp*"))
    assert run(["train", "--resume", "parts"]) == 0
    assert made(Path("parts")) == whole


def made(folder: Path) -> dict[str, bytes]:
    """Adapter, pictures and measurements of a run."""
    kinds = ("adapter/*", "samples/*", "*.png", "evaluations.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for kind in kinds for path in folder.glob(kind)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run of three epochs makes that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train("--out", str(out), epochs=3)
    found = made(out)
    assert len(found) == 7  # two measurements with their pictures
    return found


def test_pictures_that_are_missing_are_drawn_again_and_measurements_stay() -> None:
    train("--out", "a", epochs=2)
    before = {path: path.read_bytes() for path in Path("a").rglob("*.png")}
    before |= {path: path.read_bytes() for path in (Path("a/evaluations.jsonl"), Path("a/metrics.jsonl"))}
    for missing in ("samples/epoch_0002.png", "before_after.png"):
        Path("a", missing).unlink()
        assert run(["train", "--resume", "a"]) == 0
        assert {path: path.read_bytes() for path in before} == before


def test_damaged_lines_are_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    train("--out", "a", "--eval-every", "1", epochs=2)
    before = adapter("a")
    metrics, evaluations = Path("a/metrics.jsonl"), Path("a/evaluations.jsonl")
    metrics.write_bytes(metrics.read_bytes()[:-40])
    evaluations.write_bytes(b"\xff{\n[1]\n" + evaluations.read_bytes())
    capsys.readouterr()
    assert run(["train", "--resume", "a"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "line 2 of 'a/metrics.jsonl' is damaged and left out" in said
    assert "line 1, 2 of 'a/evaluations.jsonl' is damaged and left out" in said
    assert adapter("a") == before
    assert json.loads(Path("a/run.json").read_text())["epochs_done"] == 2


def test_a_run_of_another_number_of_threads_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    train("--out", "a", epochs=1)
    record = json.loads(Path("a/run.json").read_text())
    assert record["versions"]["threads"] == str(torch.get_num_threads())
    record["versions"]["threads"] = "99"
    Path("a/run.json").write_text(json.dumps(record))
    for _ in range(2):  # what it began with is not forgotten
        assert run(["train", "--resume", "a"]) == 0
        assert "threads 99 then," in " ".join(capsys.readouterr().err.split())
    resumed = json.loads(Path("a/run.json").read_text())
    assert resumed["versions"] == record["versions"]
    assert resumed["resumed_with"] == [{**record["versions"], "threads": str(torch.get_num_threads())}]


def test_a_run_in_bf16_that_comes_to_a_processor_without_is_told_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "cpu_computes_bf16", lambda: True)
    train("--out", "a", "--precision", "bf16", "--clip-range", "0.01", epochs=1)
    assert "bf16 instructions" not in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(plan, "cpu_computes_bf16", lambda: False)
    assert run(["train", "--resume", "a"]) == 0
    assert "no bf16 instructions of this processor" in " ".join(capsys.readouterr().err.split())


def test_a_memory_that_is_full_while_measuring_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from texforce_cli import devices
    from texforce_cli.workflows import heldout

    real, done = heldout.draw, list[Any]()

    def small(policy: Any, texts: Any, seeds: Any, *, batch: int) -> Any:
        done.append(batch)
        if min(batch, len(texts)) > 2:
            raise torch.OutOfMemoryError("full")
        return real(policy, texts, seeds, batch=batch)

    monkeypatch.setattr(heldout, "draw", small)
    monkeypatch.setattr(devices, "release", lambda: done.append("freed"))
    train("--out", "a", epochs=1)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("the memory of cpu was too full for 4 images at once: it goes on with 2") == 1
    assert done[done.index(4) :][:3] == [4, "freed", 2]


def test_a_run_is_not_resumed_on_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    train("--out", "a", epochs=1)
    record = json.loads(Path("a/run.json").read_text())
    record["model"]["sha256"] = "0" * 64
    Path("a/run.json").write_text(json.dumps(record))
    assert run(["train", "--resume", "a"]) == 1
    assert "the model 'tiny' has changed since 'a' was begun" in capsys.readouterr().err


def test_one_command_begins_a_run_and_goes_on_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.toml").write_text("images = 80\nrank = 2\n")  # the flag --epochs is stronger
    auto = "--config", "a.toml", "--auto-resume"
    train(*auto, code=2)
    assert "--auto-resume goes on with the run in --out; add --out FOLDER" in capsys.readouterr().err
    train(*auto, "--out", "a")
    before = adapter("a")
    shutil.rmtree("a/checkpoints/epoch_0002")
    train(*auto, "--out", "a", "--dry-run")
    train(*auto, "--out", "a")
    assert "going on after epoch 1" in capsys.readouterr().err and adapter("a") == before
    train(*auto, "--out", "a")
    assert "'a' had finished" in capsys.readouterr().err
    train(*auto, "--out", "a", "--rank", "4", code=2)
    assert "begun with other options: rank (2 -> 4)" in capsys.readouterr().err


def test_one_command_goes_on_with_a_run_whose_micro_batch_was_chosen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "machine_memory_gb", lambda: 0.0)
    small_pipeline().save_pretrained("small")
    command = (
        "train --reward brightness --model small --out a --auto-resume --size 16 --steps 2 --eval-images 0 --epochs 1"
    )
    command += " --samples-per-epoch 2 --preset auto --micro-batch auto --grad-accum"
    assert run([*command.split(), "2"]) == 0
    recorded = json.loads(Path("a/run.json").read_text())["config"]
    assert (recorded["micro_batch"], recorded["grad_accum"]) == (1, 16)
    capsys.readouterr()
    assert run([*command.split(), "2"]) == 0
    assert "'a' had finished" in capsys.readouterr().err
    assert run([*command.split(), "4"]) == 2
    assert "begun with other options: grad_accum (16 -> 4)" in capsys.readouterr().err


def test_the_command_that_a_run_on_a_folder_ends_with_draws(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny.WEIGHTS, "my model")
    train("--out", "a", "--model", "my model", "--eval-images", "0", epochs=1)
    command = " ".join(capsys.readouterr().err.split()).partition("next: texforce ")[2]
    assert run([*shlex.split(command), "--steps", "1"]) == 0


def test_a_run_goes_on_where_its_model_was_moved_to(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny.WEIGHTS, "model")
    train("--out", "a", "--model", "model", epochs=1)
    Path("model").rename("moved")
    assert run(["train", "--resume", "a"]) == 2
    assert "of 'a' is not there; say where it is with --model" in " ".join(capsys.readouterr().err.split())
    assert run(["train", "--resume", "a", "--model", "moved"]) == 0
    assert json.loads(Path("a/run.json").read_text())["config"]["model"] == str(Path("moved").resolve())
    shutil.copytree("moved", "other")
    with next(Path("other/unet").glob("*.safetensors")).open("rb+") as weights:
        weights.seek(-1, 2)
        weights.write(b"!")
    assert run(["train", "--resume", "a", "--model", "other"]) == 1
    assert "the model 'other' has changed since 'a' was begun" in capsys.readouterr().err
    assert run(["train", "--resume", "a", "--model", "tiny"]) == 2  # a name is another model


def test_a_run_is_resumed_that_is_older_than_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    train("--out", "a", epochs=1)
    record = json.loads(Path("a/run.json").read_text())
    del record["config"]["draft_every"], record["origins"]["draft_every"]
    Path("a/run.json").write_text(json.dumps(record))
    assert run(["train", "--resume", "a"]) == 0
    assert json.loads(Path("a/run.json").read_text())["origins"]["draft_every"] == "default"


def test_a_run_is_not_resumed_that_knows_an_option_more(capsys: pytest.CaptureFixture[str]) -> None:
    train("--out", "a", epochs=1)
    record = json.loads(Path("a/run.json").read_text())
    record["config"]["moods"] = 3
    record["versions"]["texforce"] = "9.0"
    Path("a/run.json").write_text(json.dumps(record))
    assert run(["train", "--resume", "a"]) == 1
    assert "'a' was begun with texforce 9.0, whose option 'moods' is unknown here" in capsys.readouterr().err


def test_a_resumed_run_needs_no_longer_what_it_started_from() -> None:
    train("--out", "first", epochs=1)
    train("--out", "a", "--init-lora", "first", epochs=1)
    before = adapter("a")
    shutil.rmtree("first")
    assert run(["train", "--resume", "a", "--dry-run"]) == 0
    assert run(["train", "--resume", "a"]) == 0
    assert adapter("a") == before


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--steps", "2000"], 2, "2000 denoising steps are too many"),
        (["--init-lora", "both", "--train", "text-encoder", "--rank", "2"], 1, "are not trained here"),
        (["--log", "wandb"], 1, "needs wandb"),
    ],
)
def test_what_only_the_model_can_tell_is_one_sentence(
    arguments: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "both" in arguments:
        train("--out", "both", "--train", "both", "--rank", "2", epochs=1)
    train("--out", "a", *arguments, code=code)
    assert sentence in capsys.readouterr().err
    assert not Path("a").exists() or json.loads(Path("a/run.json").read_text())["status"] == "failed"


def test_demo_takes_its_smallest_budget(capsys: pytest.CaptureFixture[str]) -> None:
    from texforce_cli.workflows.plan import plan

    made = plan({"reward": ["brightness"], "model": "tiny", "images": 256, "advantages": "group"})
    assert made.config.total_epochs == 1
    assert run(["train", "--reward", "brightness", "--model", "tiny", "--images", "256", "--dry-run"]) == 0


def test_a_dry_run_of_a_run_shows_its_plan(capsys: pytest.CaptureFixture[str]) -> None:
    train("--out", "a", epochs=1)
    capsys.readouterr()
    assert run(["train", "--resume", "a", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["config"]["out"] == "a"


def test_a_broken_plugin_is_imported_once_and_named_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata
    import types

    loads: list[int] = []

    def load() -> None:
        loads.append(1)
        raise ImportError("no module named moon")

    entry = types.SimpleNamespace(
        name="p", value="p", load=load, dist=types.SimpleNamespace(metadata={"Name": "moon-rewards", "Version": "1"})
    )
    real = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **kw: [entry] if kw.get("group") == "texforce" else real(**kw)
    )
    train("--out", "a", epochs=1)
    assert run(["train", "--resume", "a"]) == 0
    assert len(loads) == 2  # once a command
    assert capsys.readouterr().err.count("plugin 'moon-rewards' could not be loaded") == 2


def test_two_runs_do_not_share_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    from texforce_cli.files import held

    train("--out", "a", epochs=1)
    before = Path("a/run.json").read_bytes()
    with held(Path("a")):
        program = [sys.executable, "-m", "texforce_cli", "train", "--resume", "a"]
        other = subprocess.run(program, capture_output=True, text=True)
    assert other.returncode == 1
    assert "another process works in 'a'" in other.stderr and "Traceback" not in other.stderr
    assert Path("a/run.json").read_bytes() == before


def test_a_folder_is_held_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from texforce_cli.files import held
    from texforce_cli.workflows import train as workflow

    loaded: list[int] = []
    monkeypatch.setattr(workflow, "TrainingRun", lambda *about, **more: loaded.append(1))
    with held(Path("a")):
        program = ["train", "--reward", "brightness", "--model", "tiny", "--out", "a"]
        assert run(program) == 1
    assert "another process works in 'a'" in capsys.readouterr().err
    assert not loaded


def test_a_run_that_ended_meanwhile_is_not_overwritten(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from texforce_cli.workflows import train as workflow

    real = workflow.RunFolder.create

    def create(out: str, stem: str) -> Any:
        made = real(out, stem)
        (made.path / "run.json").write_text("another's")
        return made

    monkeypatch.setattr(workflow.RunFolder, "create", create)
    train("--out", "a", code=2)
    assert "'a' exists already" in capsys.readouterr().err
    assert Path("a/run.json").read_text() == "another's"


def test_what_a_run_left_that_had_not_begun_is_no_hindrance(capsys: pytest.CaptureFixture[str]) -> None:
    from texforce_cli.errors import UsageError
    from texforce_cli.workflows.run_folder import RunFolder

    folder = Path("a")
    folder.mkdir()
    for name in ("prompts.jsonl", ".lock", ".run.0123abcd.tmp.json"):
        (folder / name).write_text("")
    assert run(["train", "--resume", "a"]) == 2
    assert "no run has begun in 'a'; begin it with --out a" in capsys.readouterr().err
    assert RunFolder.create("a", "").path == folder
    (folder / ".lock").unlink()  # then the prompts are somebody's
    with pytest.raises(UsageError, match="exists already"):
        RunFolder.create("a", "")


def test_a_disk_that_is_full_at_the_very_beginning_leaves_the_name_free(monkeypatch: pytest.MonkeyPatch) -> None:
    from texforce_cli import files

    real = os.fsync

    def full(handle: int) -> None:
        if "/.run." in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        train("--out", "a", code=1)
    assert not Path("a").exists()


def test_a_watched_reward_is_measured_shown_and_chooses_the_best_epoch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from texforce_cli.rewards.builtin.pictures import JpegCompressibility

    levels = iter([0.0, 1.0, 5.0, 2.0, 0.0])  # of the base, of each epoch, and of the base again
    qualities = set()

    def score(self: JpegCompressibility, images: Any, *about: Any) -> list[float]:
        level = next(levels)
        qualities.add(self.quality)
        return [level + index / 10 for index in range(len(images))]

    monkeypatch.setattr(JpegCompressibility, "score", score)
    watched = "--watch jpeg-compressibility --reward-option jpeg-compressibility.quality=50 --eval-every 1 --keep 1 --save-every 0"
    train("--out", "a", *watched.split(), epochs=3)
    assert "watched jpeg-compressibility" in capsys.readouterr().err
    measured = [json.loads(line) for line in Path("a/evaluations.jsonl").read_text().splitlines()]
    values = {row["epoch"]: row["watched"]["jpeg-compressibility"]["mean"] for row in measured}
    assert len(values) == 3
    first = measured[0]["watched"]["jpeg-compressibility"]
    assert first["difference"]["mean"] == pytest.approx(first["mean"] - first["base_mean"], abs=1e-9)
    record = json.loads(Path("a/run.json").read_text())
    assert record["best_epoch"] == 2
    assert {path.name for path in Path("a/checkpoints").iterdir()} == {"epoch_0002", "epoch_0003"}
    assert Path("a/curve.png").is_file()
    assert qualities == {50}
    assert run(["train", "--resume", "a"]) == 0  # the measurements are read again


def test_diversity_is_watched_beside_rewards_and_measured_in_its_own_number_of_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from texforce_cli.core.comparison import diversity
    from texforce_cli.diffusion.models import load_pipeline, resolve_model
    from texforce_cli.diffusion.policy import Denoising, Policy
    from texforce_cli.diffusion.sampler import draw
    from texforce_cli.prompts import load_prompts
    from texforce_cli.prompts.heldout import heldout_pairs

    options = (
        "--watch diversity --watch brightness --eval-images 40 --prompts color --guidance 1 --steps 2 --eval-steps 3"
    )
    train("--out", "a", *options.split(), epochs=1)
    said = capsys.readouterr().err
    assert said.index("watched diversity") < said.index("watched brightness")  # as they were given
    found = json.loads(Path("a/evaluations.jsonl").read_text())["watched"]["diversity"]

    prompts, seeds = heldout_pairs(load_prompts("color", "tiny"), 40)  # 20 of 29 seen, 2 of each of 10 unseen
    assert [[p.text for p in prompts].count(p.text) for p in prompts] == [1] * 20 + [2] * 20
    policy = Policy(load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32"), Denoising(3))
    drawn = draw(policy, [p.text for p in prompts], seeds, batch=40)
    alike = [drawn[[i for i, p in enumerate(prompts) if p.text == text]] for text in {p.text for p in prompts[20:]}]
    assert found["difference"]["n"] == 10
    assert found["base_mean"] == pytest.approx(np.mean([diversity(list(pictures)) for pictures in alike]), rel=1e-3)


@pytest.mark.parametrize(("prompts", "enough"), [(100, 102), (2, 4), (1, None)])
def test_how_many_pictures_diversity_needs_is_told(
    prompts: int, enough: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.txt").write_text("".join(f"{number} cats\n" for number in range(prompts)))
    command = "train --model tiny --reward brightness --prompts p.txt --watch diversity --dry-run --eval-images".split()
    assert run([*command, "3"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the 3 held-out ones are not enough" in said
    assert (f"give --eval-images {enough}" if enough else "give two prompts or more") in said
    if enough:
        assert run([*command, str(enough - 1)]) == 2 and run([*command, str(enough)]) == 0


def test_a_run_ends_when_what_is_watched_has_fallen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from texforce_cli.workflows.heldout import HeldOut
    from texforce_cli.workflows.training_run import TrainingRun

    monkeypatch.setattr(HeldOut, "fallen", lambda self, patience: "brightness" if len(self.history) >= 2 else None)
    monkeypatch.setattr(TrainingRun, "best_epoch", 1)
    train("--out", "a", "--eval-every", "1", "--watch", "brightness", "--watch-patience", "2", epochs=5)
    said = capsys.readouterr().err
    assert "brightness was surely below the base in 2 measurements in a row" in said
    assert 'next: texforce sample "a cat" --lora a/checkpoints/epoch_0001 --compare' in said  # not the last, a/adapter
    assert Path("a/checkpoints/epoch_0001", FILE_NAME).is_file()
    record = json.loads(Path("a/run.json").read_text())
    assert (record["status"], record["epochs_done"]) == ("finished", 2)
    assert "surely below" in record["reason"]


def test_a_run_that_ends_by_diversity_says_what_its_best_epoch_is_best_by(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from texforce_cli.workflows.heldout import HeldOut

    monkeypatch.setattr(HeldOut, "fallen", lambda self, patience: "diversity" if self.history else None)
    options = "--watch diversity --watch-patience 1 --eval-every 1 --eval-images 40 --prompts color --steps 2"
    train("--out", "a", *options.split(), epochs=3)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "diversity was surely below the base in 1 measurements in a row; the best epoch by the reward, brightness, is 1"
        in said
    )


def test_only_a_sure_fall_of_the_first_watched_reward_counts() -> None:
    from texforce_cli.core.statistics import Interval
    from texforce_cli.workflows.events import Evaluation, Watched
    from texforce_cli.workflows.heldout import HeldOut

    def measured(high: float) -> Evaluation:
        interval = Interval(high - 1, high - 2, high, 8)
        watched = {"judge": Watched(0.0, 0.0, interval), "other": Watched(0.0, 0.0, Interval(-1, -2, -0.5, 8))}
        return Evaluation(1, 1, 0.0, 0.0, interval, None, None, (), (), watched)

    heldout = object.__new__(HeldOut)
    heldout.watched = ["judge", "other"]
    heldout.history = [measured(-0.1), measured(-0.1)]
    assert heldout.fallen(2) == "judge"
    assert heldout.fallen(3) is None  # too few measurements
    assert heldout.fallen(0) is None
    heldout.history.append(measured(0.1))
    assert heldout.fallen(2) is None


def test_what_cannot_be_watched_is_told_beforehand(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--reward", "brightness", "--model", "tiny", "--watch", "brihgtness"]) == 2
    assert "did you mean 'brightness'" in capsys.readouterr().err
    assert (
        run(["train", "--reward", "brightness", "--model", "tiny", "--watch", "tiny-judge", "--eval-images", "0"]) == 2
    )
    assert "--eval-images is 0" in capsys.readouterr().err
    few = ["--watch", "diversity", "--eval-images", "12", "--prompts", "color"]
    assert run(["train", "--reward", "brightness", "--model", "tiny", *few]) == 2
    assert "give --eval-images 24" in capsys.readouterr().err
    for without in (["--watch-patience", "3"], ["--watch-patience", "3", "--watch", "tiny-judge", "--eval-every", "0"]):
        assert run(["train", "--reward", "brightness", "--model", "tiny", *without]) == 2
        assert "--watch-patience 3" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_watched_reward_has_its_options() -> None:
    Path("t.csv").write_text("picture,score\n")
    table = ["--reward-option", "scores-file.path=t.csv", "--reward-option", "scores-file.missing=0.25"]
    train("--out", "a", "--watch", "scores-file", *table, epochs=1)
    measured = json.loads(Path("a/evaluations.jsonl").read_text())
    assert measured["watched"]["scores-file"]["mean"] == 0.25
    assert run(["train", "--resume", "a", "--dry-run"]) == 0


def test_what_can_end_no_run_is_told() -> None:
    asked = {"reward": ["brightness"], "model": "tiny", "epochs": 15, "watch": ["tiny-judge"], "watch_patience": 3}
    [said] = [line for line in plan.plan(asked).advice() if "--watch" in line]
    assert said == (
        "--watch-patience 3 never ends this run: of its 15 epochs 2 before the last are measured; give --eval-every 4 or less"
    )
    assert not [line for line in plan.plan({**asked, "eval_every": 4}).advice() if "--watch" in line]
    [said] = [
        line
        for line in plan.plan({**asked, "watch_patience": 0, "watch": ["brightness"]}).advice()
        if "--watch" in line
    ]
    assert said.startswith("--watch brightness: it is trained on")


def test_a_resume_removes_what_a_killed_process_was_writing() -> None:
    train("--out", "a", epochs=1)
    leftovers = [Path("a/checkpoints/.epoch_0002.0123abcd.tmp"), Path("a/.metrics.0123abcd.tmp.jsonl")]
    leftovers[0].mkdir()
    (leftovers[0] / "state.safetensors").write_bytes(b"half")
    leftovers[1].write_text("half")
    Path("a/.mine.tmp").write_text("kept")
    assert run(["train", "--resume", "a"]) == 0
    assert not any(path.exists() for path in leftovers)
    assert Path("a/.mine.tmp").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bits() -> None:
    root = Path(__file__).parent.parent
    program = [
        sys.executable,
        "-m",
        "benchmarks.kill_resume",
        str(Path.cwd() / "kills"),
        "--kills",
        "4",
        "--epochs",
        "8",
    ]
    done = subprocess.run([*program, "--out", str(Path.cwd() / "kills.json")], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(Path("kills.json").read_text())["differences"] == []
