"""One configuration: where values come from, and every mistake at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given as any_of
from hypothesis import strategies as st

from texforce_cli.config import FIELDS, TrainConfig, differences, given, resolve
from texforce_cli.errors import UsageError
from texforce_cli.presets import PRESETS, Family, automatic_preset
from texforce_cli.workflows.cost import Memory, computed_petaflop
from texforce_cli.workflows.plan import plan


def test_flag_over_environment_over_file_over_preset_over_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.toml"
    path.write_text('steps = 11\nguidance = 2\nlr = 0.5\nreward = ["a"]\n')
    monkeypatch.setenv("TEXFORCE_GUIDANCE", "3")
    monkeypatch.setenv("TEXFORCE_LR", "0.25")
    monkeypatch.setenv("TEXFORCE_HOME", "somewhere else")
    found = resolve({"lr": "0.125", "preset": "tiny"}, path)
    assert (found.config.lr, found.origins["lr"]) == (0.125, "flag")
    assert (found.config.guidance, found.origins["guidance"]) == (3.0, "environment")
    assert (found.config.steps, found.origins["steps"]) == (11, "file")
    assert (found.config.group_size, found.origins["group_size"]) == (16, "preset tiny")
    assert (found.config.eta, found.origins["eta"]) == (1.0, "default")


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("stepz = 5\nrank = 0\nmicro-batch = 4\n")
    with pytest.raises(UsageError) as caught:
        resolve({"lr": "fast", "train": "vae", "epochs": "-1", "train_steps": "first:0"}, path)
    text = str(caught.value)
    assert text.startswith("6 mistakes in the configuration: ")
    for part in (
        "unknown key 'stepz'",
        "did you mean 'steps'?",
        "--rank 0 (file) must be above 0",
        "--lr 'fast' (flag) is not a number",
        "--train 'vae' (flag) is none of text-encoder, unet, both",
        "--epochs -1 (flag) must be above 0",
        "--train-steps first:0 (flag) is not first:N",
    ):
        assert part in text
    assert "micro" not in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"images": 500, "epochs": 3}, "say the same thing twice"),
        ({"samples_per_epoch": 10, "group_size": 4}, "no multiple of --group-size 4"),
        ({"images": 100, "samples_per_epoch": 200}, "less than one epoch"),
        ({"advantages": "group"}, "needs --group-size 2"),
        ({"kl_target": 1e-7, "samples_per_epoch": 8, "lr_schedule": "constant"}, "needs two updates an epoch"),
        ({"negative_prompt": "caf\udce9"}, "--negative-prompt is no UTF-8 text"),
        ({"kl_target": 1e-7}, "use --lr-schedule constant"),
        ({"eval_images": 1}, "must be 0, or 2 and more"),
        ({"eta": 1.5}, "must be between"),
        ({"rank": 10**400}, "is not a whole number"),
        ({"preset": "tinny"}, "did you mean 'tiny'"),
        ({"images": "nan"}, "is not a whole number"),
        ({"lr": "inf"}, "is not a number"),
        ({"steps": "3.5"}, "is not a whole number"),
    ],
)
def test_a_contradiction_is_named(flags: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        resolve(flags, family="sd")


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff\x00")
    for path in (tmp_path / "a.toml", tmp_path / "none.toml"):
        with pytest.raises(UsageError, match=path.name):
            resolve({}, path)


def test_images_of_a_flag_replace_epochs_of_a_preset_and_the_other_way_round() -> None:
    assert resolve({"preset": "phrase", "images": 1024}).config.total_epochs == 2
    assert resolve({"preset": "tiny", "epochs": 3}).config.total_epochs == 3


def test_images_of_a_flag_replace_epochs_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("epochs = 7\n")
    assert resolve({"images": 1024}, tmp_path / "a.toml").config.total_epochs == 2


def test_the_presets_of_stable_diffusion_are_the_papers() -> None:
    for name, samples in (("phrase", 512), ("many", 1024), ("face", 512), ("hand", 512)):
        config = resolve({"preset": name}).config
        assert (config.samples_per_epoch, config.steps, config.lr, config.rank) == (samples, 50, 3e-4, 16)
        assert (config.guidance, config.train_steps, config.clip_range, config.advantages) == (
            5.0,
            "random:0.5",
            1e-4,
            "prompt",
        )
        assert 40 <= config.total_epochs <= 50
        assert config.updates_per_epoch == 2
    assert [resolve({"preset": name}).config.prompts for name in ("face", "hand")] == ["face", "hand"]
    assert automatic_preset("sd", "color") == "phrase"
    assert automatic_preset("sd", "animals") == "many"
    assert automatic_preset("sd", "hand") == "hand"
    assert automatic_preset("tiny", "hand") == "tiny"


def test_every_preset_is_a_valid_configuration() -> None:
    for name in PRESETS:
        for train in ("text-encoder", "unet", "both"):
            assert resolve({"preset": name, "train": train}).config.total_epochs > 0


@pytest.mark.parametrize("family", ["tiny", "sd"])
@pytest.mark.parametrize("train", ["text-encoder", "unet", "both"])
def test_the_fast_preset_changes_the_automatic_one_and_is_known_with_the_model(family: Family, train: str) -> None:
    usual = resolve({"train": train}, family=family).config
    fast = resolve({"preset": "fast", "train": train}, family=family)
    assert fast.config.lr == usual.lr
    found = (fast.config.train_steps, fast.config.steps, fast.config.total_epochs)
    assert found == (("window:3", 10, 20) if family == "tiny" else ("window:4", 20, usual.total_epochs))
    assert fast.origins["train_steps"] == "preset fast"
    unknown = resolve({"preset": "fast"}).config  # before the model is known: no values and no mistakes
    assert unknown.steps == TrainConfig().steps


@pytest.mark.parametrize("able", [True, False])
def test_the_fast_preset_draws_in_bf16_where_the_processor_multiplies_in_it(
    able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("texforce_cli.workflows.plan.cpu_computes_bf16", lambda: able)
    flags = {"reward": ["brightness"], "model": "tiny", "device": "cpu"}
    made = plan({**flags, "preset": "fast"})
    assert made.config.precision == ("bf16" if able else "fp32")
    assert made.origins["precision"] == ("preset fast" if able else "preset fast, resolved")
    assert not any("bf16" in line for line in made.advice())
    assert plan({**flags, "preset": "fast", "precision": "fp32"}).config.precision == "fp32"
    assert plan(flags).config.precision == "fp32"
    assert plan({**flags, "preset": "fast", "model": "sd15"}).config.precision == "fp32"
    with monkeypatch.context() as gpu:
        gpu.setattr("texforce_cli.workflows.plan.resolve_device", torch.device)
        assert plan({**flags, "preset": "fast", "device": "cuda"}).config.precision == "fp32"  # not measured there
    asked = plan({**flags, "precision": "bf16"})  # is told where it is slow
    assert asked.config.precision == "bf16"
    assert [line for line in asked.advice() if "no bf16 instructions" in line] == asked.of_this_machine()
    assert len(asked.of_this_machine()) == (0 if able else 1)


def test_contradictions_of_bare_defaults_are_left_to_the_preset() -> None:
    assert resolve({"images": 256, "advantages": "group"}).config.images == 256
    assert resolve({"images": 256, "advantages": "group"}, family="tiny").config.total_epochs == 1


def test_only_what_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.toml").write_text("steps = 4\n")
    monkeypatch.setenv("TEXFORCE_LR", "0.5")
    assert given({"rank": "8", "lr": None, "reward": []}, tmp_path / "a.toml") == {"rank": 8, "steps": 4}
    monkeypatch.setenv("TEXFORCE_MICRO_BATCH", "2")
    (tmp_path / "a.toml").write_text("micro_batch = 4\ngrad_accum = 128\n")
    assert given({}, tmp_path / "a.toml") == {"micro_batch": 4, "grad_accum": 128}


def test_the_computed_memory_by_hand() -> None:
    # fp16: 2.14 GB of weights, 2 images * 2 branches * 0.8 GB beside 10 images * 51 latents * 64 kB
    memory = Memory("text-encoder", "fp16", False, 2, 1, 10, 51, 512)
    trajectories = 10 * 51 * 16384 * 4 / 1e9
    assert memory.gb(2) == pytest.approx(2.14 + 3.2 + trajectories)
    assert replace(memory, train="both", size=1024).gb(1) == pytest.approx(2.14 + 4 * (2.22 + trajectories))
    assert replace(memory, checkpointing=True, precision="fp32").gb(1) == pytest.approx(4.28 + 1.02 + trajectories)
    memory = replace(memory, images=512)  # 3.9 GB and 1.6 an image, of nine tenths
    assert [memory.micro_batch(gb) for gb in (80, 24, 12, 10, 7)] == [8, 8, 4, 2, 1]
    assert memory.gb(1) == pytest.approx(
        2.14 + 2 * 512 * trajectories / 10, rel=1e-3
    )  # two of them beside nothing else


@pytest.mark.parametrize("case", [("text-encoder", "bf16", False, 1), ("both", "fp32", True, 2)])
def test_the_computed_memory_is_what_a_pass_of_training_holds(case: tuple[str, str, bool, int]) -> None:
    from benchmarks.memory import held

    counted, predicted = held(*case)
    assert predicted == pytest.approx(counted, rel=0.05)


def test_the_computed_work_by_hand() -> None:
    # the paper's 50 steps with guidance, half of them trained: 100 x 0.803 + 50 x 1.669 + 2.51 = 166.26 TFLOP an image
    assert computed_petaflop(1, 100, 50, 512) == pytest.approx(0.16626)
    assert computed_petaflop(1, 100, 50, 256) == pytest.approx(0.16626 / 4)


def test_differences_name_old_and_new() -> None:
    assert differences({"lr": 1.0, "out": "a"}, {"lr": 2.0, "out": "b"}, ignore=("out",)) == ["lr (1.0 -> 2.0)"]


@any_of(st.dictionaries(st.sampled_from(sorted(FIELDS)), st.one_of(st.text(), st.integers(), st.floats(), st.none())))
def test_whatever_is_given_the_answer_is_a_configuration_or_one_sentence(flags: dict[str, object]) -> None:
    try:
        config = resolve(flags).config
    except UsageError as error:
        assert "\n" not in str(error) or any(isinstance(v, str) and "\n" in v for v in flags.values())
    else:
        assert isinstance(config, TrainConfig)
        assert config.rank > 0 and config.steps > 0 and config.total_epochs > 0


@pytest.mark.parametrize(
    ("asked", "batch"),
    [
        ({"micro_batch": 8}, (8, 8)),  # the preset's update of two times 32 images
        ({"micro_batch": 24}, (24, 3)),
        ({"micro_batch": 128}, (128, 1)),
        ({"micro_batch": 4, "grad_accum": 2}, (4, 2)),
        ({"micro_batch": 2, "preset": "many"}, (2, 256)),
        ({"config": True, "micro_batch": "2"}, (2, 256)),  # over a run's own file, of micro-batches of 4, 128 an update
        ({"config": True, "micro_batch": "auto"}, (4, 128)),
        ({"config": True, "grad_accum": 1}, (4, 1)),
    ],
)
def test_a_micro_batch_alone_leaves_an_update_its_images(
    tmp_path: Path, asked: dict[str, object], batch: tuple[int, int]
) -> None:
    (tmp_path / "run.toml").write_text("micro_batch = 4\ngrad_accum = 128\n")
    file = tmp_path / "run.toml" if asked.pop("config", None) else None
    found = resolve({"reward": ["brightness"], **asked}, file, family="tiny").config
    assert (found.micro_batch, found.grad_accum) == batch
    assert found.fit_micro_batch is (asked.get("micro_batch") == "auto")


def test_auto_is_the_micro_batch_of_the_preset_and_is_fitted_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"reward": ["brightness"], "model": "tiny", "micro_batch": "auto"}
    resolved = resolve(flags, family="tiny")
    assert (resolved.config.micro_batch, resolved.config.fit_micro_batch) == (32, True)
    made = plan({**flags, "device": "cpu"})
    assert made.config.fit_micro_batch is False and "on cpu it is --micro-batch 32" in made.advice()[0]
    assert plan({**flags, "timestep_batch": "auto"}).config.timestep_batch == 1  # on a CPU
    assert plan({**flags, "timestep_batch": "3"}).config.timestep_batch == 3
    monkeypatch.setenv("TEXFORCE_MICRO_BATCH", "auto")
    numbered = resolve({**flags, "micro_batch": "8"}, family="tiny").config
    assert (numbered.micro_batch, numbered.fit_micro_batch) == (8, False)
    monkeypatch.setenv("TEXFORCE_MICRO_BATCH", "8")
    monkeypatch.setattr("texforce_cli.workflows.plan.resolve_device", torch.device)
    assert plan({**flags, "micro_batch": "auto", "device": "mps"}).config.fit_micro_batch is False
    monkeypatch.setattr("texforce_cli.workflows.plan.device_memory_gb", lambda device: 24.0)
    monkeypatch.setattr("texforce_cli.workflows.plan.gpu_precision", lambda: "bf16")
    made = plan({**flags, "device": "cuda"}).config
    assert (made.micro_batch, made.grad_accum, made.fit_micro_batch) == (32, 2, True)
    monkeypatch.delenv("TEXFORCE_MICRO_BATCH")
    wide = {"reward": ["brightness"], "model": "sd15", "device": "cuda"}
    assert any("the GPU gets filled" in line for line in plan(wide).advice())
    assert not any("filled" in line for line in plan({**wide, "micro_batch": "2", "timestep_batch": "4"}).advice())


def test_stable_diffusion_takes_the_micro_batch_that_fits_into_the_memory_of_a_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fp32 on a CPU: 1.07 G parameters of 4 bytes, and 3.1 GB of activations of the two branches of an image."""
    flags = {"reward": ["brightness"], "model": "sd15", "device": "cpu", "samples_per_epoch": 8, "grad_accum": 1}
    told = {}
    for memory in (7.0, 14.0, 128.0):
        monkeypatch.setattr("texforce_cli.workflows.plan.machine_memory_gb", lambda gb=memory: gb)
        made = plan(flags)
        assert made.config.fit_micro_batch is False and made.config.precision == "fp32"
        told[memory] = made.config.micro_batch, [line for line in made.advice() if "memory" in line]
    assert told[14.0] == (2, []) and told[128.0] == (8, [])
    assert told[7.0][0] == 1 and "about 7.4 GB of memory are needed at --micro-batch 1" in told[7.0][1][0]
    assert plan({**flags, "micro_batch": "8", "precision": "bf16"}).config.micro_batch == 8
    monkeypatch.setattr("texforce_cli.workflows.plan.machine_memory_gb", lambda: 7.0)
    assert not plan({**flags, "gradient_checkpointing": True}).advice()
