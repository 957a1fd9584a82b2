"""`texforce sample` through the real command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from transformers import CLIPImageProcessor

from texforce_cli.cli.app import run
from texforce_cli.cli.sampling import parse_seeds
from texforce_cli.diffusion.adapters import Adapter
from texforce_cli.diffusion.models import load_pipeline, resolve_model
from texforce_cli.errors import UsageError
from texforce_cli.lora.write import lora_bytes
from texforce_cli.workflows import sample as workflow
from texforce_cli.workflows.drawing import SCHEDULERS

FAST = ["--model", "tiny", "--steps", "3"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lora() -> str:
    """A LoRA that changes the pictures, in a folder as a run leaves it."""
    pipeline = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32")
    adapter = Adapter.insert(pipeline, "text-encoder", rank=2, alpha=2, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    Path("a/adapter").mkdir(parents=True)
    about = {"base": "tiny", "steps": 4, "guidance": 1.0}
    data = lora_bytes(adapter.export(), {"texforce": json.dumps(about)})
    Path("a/adapter/pytorch_lora_weights.safetensors").write_bytes(data)
    return "a"


def pixels(path: str | Path) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_pictures_say_how_they_were_made() -> None:
    assert run(["sample", "a green rabbit", "a cat", "--seeds", "0:2", "--out", "p", "--grid", *FAST]) == 0
    names = sorted(path.name for path in Path("p").iterdir())
    assert names == [
        "000-a-green-rabbit-seed0.png",
        "000-a-green-rabbit-seed1.png",
        "001-a-cat-seed0.png",
        "001-a-cat-seed1.png",
        "grid.png",
    ]
    text = Image.open("p/001-a-cat-seed1.png").text  # type: ignore[attr-defined]
    assert (text["prompt"], text["seed"], text["model"], text["steps"]) == ("a cat", "1", "tiny", "3")
    assert "Seed: 1" in text["parameters"] and json.loads(text["model_hash"])["sha256"]
    assert not np.array_equal(pixels("p/001-a-cat-seed0.png"), pixels("p/001-a-cat-seed1.png"))


def test_a_seed_means_the_same_noise_whatever_the_batch() -> None:
    assert run(["sample", "a cat", "a dog", "--seeds", "0:3", "--out", "p", "--batch", "4", *FAST]) == 0
    assert run(["sample", "a dog", "--seeds", "2", "--out", "q", "--batch", "1", *FAST]) == 0
    assert np.abs(pixels("p/001-a-dog-seed2.png") - pixels("q/000-a-dog-seed2.png")).max() <= 2


def test_files_are_never_overwritten_unless_forced(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", "a cat", "--out", "p", *FAST]
    assert run(command) == 0
    Path("p/000-a-cat-seed0.png").write_bytes(b"mine")
    assert run(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert Path("p/000-a-cat-seed0.png").read_bytes() == b"mine"
    assert run([*command, "--force"]) == 0
    assert pixels("p/000-a-cat-seed0.png").shape == (64, 64, 3)


def test_a_lora_brings_its_model_and_settings_and_compare_puts_the_base_beside_it(
    lora: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "a cat", "--lora", f"{lora}:0.8", "--compare", "--grid", "--out", "p", "--json"]
    assert run(command) == 0
    captured = capsys.readouterr()
    assert "model: tiny (the base of the LoRA)" in captured.err
    document = json.loads(captured.out)
    assert len(document["files"]) == 2 and document["grid"]
    tuned = Image.open("p/000-a-cat-seed0-tuned.png")
    about = tuned.text  # type: ignore[attr-defined]
    assert (about["steps"], about["guidance"]) == ("4", "1")
    assert json.loads(about["loras"])[0]["weight"] == 0.8
    base = Image.open("p/000-a-cat-seed0-base.png")
    assert base.text["loras"] == "[]"  # type: ignore[attr-defined]
    assert np.abs(np.asarray(tuned).astype(int) - np.asarray(base)).max() > 10
    assert run(["sample", "a cat", "--model", "tiny", "--steps", "4", "--guidance", "1", "--out", "q"]) == 0
    assert np.array_equal(pixels("q/000-a-cat-seed0.png"), pixels("p/000-a-cat-seed0-base.png"))


@pytest.mark.parametrize(
    "command",
    [
        "sample a-cat --model tiny --steps 1 --out p --lora LORA",
        "eval --prompts p.txt --variant x=tiny+LORA --images-only --steps 1 --seeds 0 --size 64 --out p",
        "train --reward brightness --model tiny --dry-run --init-lora LORA",
    ],
)
def test_what_may_be_wrong_with_a_lora_is_told_wherever_it_is_used(lora: str, command: str, capsys: Any) -> None:
    Path("p.txt").write_text("a cat\n")
    assert run(["fuse", lora, "--format", "peft", "--out", "l"]) == 0
    Path("l/adapter_config.json").unlink()
    capsys.readouterr()
    assert run(command.replace("LORA", "l:unet=0.3").split()) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "its alpha is not known" in said
    assert "' has no component for unet; it has text_encoder" in said


def test_a_lora_of_weight_zero_is_the_base(lora: str) -> None:
    assert run(["sample", "a cat", "--lora", f"{lora}:0", "--out", "p"]) == 0
    assert run(["sample", "a cat", "--model", "tiny", "--steps", "4", "--guidance", "1", "--out", "q"]) == 0
    assert np.abs(pixels("p/000-a-cat-seed0.png") - pixels("q/000-a-cat-seed0.png")).max() <= 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws_the_same_picture_alone_or_in_a_batch(scheduler: str) -> None:
    fast = ["--model", "tiny", "--steps", "6", "--scheduler", scheduler, "--guidance", "2"]
    assert run(["sample", "a cat", "--seeds", "0:2", "--out", "p", *fast]) == 0
    assert run(["sample", "a cat", "--seeds", "1", "--out", "q", *fast]) == 0
    difference = np.abs(pixels("p/000-a-cat-seed1.png") - pixels("q/000-a-cat-seed1.png"))
    assert difference.max() <= 3


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_what_is_not_finite_is_no_black_picture(
    scheduler: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = AutoencoderTiny.decode
    monkeypatch.setattr(AutoencoderTiny, "decode", lambda *a, **k: tuple(o * torch.nan for o in real(*a, **k)))
    assert run(["sample", "a cat", "--out", "p", "--scheduler", scheduler, *FAST]) == 1
    assert "the VAE drew values that are not finite; use --precision fp32 or bf16" in capsys.readouterr().err
    assert not Path("p").exists()


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_the_safety_checker_looks_once_at_each_picture(
    scheduler: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pipeline: Any
) -> None:
    class Prude(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, images: Any, clip_input: torch.Tensor) -> tuple[Any, list[bool]]:
            return np.zeros_like(images), [bool(image.any()) for image in images]  # black is all that it likes

    pipeline.register_modules(safety_checker=Prude(), feature_extractor=CLIPImageProcessor())
    monkeypatch.setattr(workflow, "load_pipeline", lambda *a, **k: pipeline)
    command = ["sample", "a cat", "--seeds", "0:2", "--safety-checker", "--json", "--scheduler", scheduler, *FAST]
    assert run([*command, "--out", "p"]) == 0
    assert json.loads(capsys.readouterr().out)["withheld"] == 2 and not pixels("p/000-a-cat-seed0.png").any()


def test_prompts_from_a_file_and_hostile_ones(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = ["../../etc/passwd", "<script>alert(1)</script>", "a\u202ecat", "[bold]red[/bold]", "x" * 3000]
    Path("p.txt").write_text("\n".join(hostile), encoding="utf-8")
    negative = ["--negative-prompt", "an ugly dog, " * 12]
    assert run(["sample", "--prompts", "p.txt", "--out", "p", "--grid", *FAST, *negative]) == 0
    assert len(list(Path("p").iterdir())) == 6
    assert {path.resolve().parent for path in Path().rglob("*.png")} == {Path("p").resolve()}
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("are beyond the limit") == 2 and "of the prompt 'an ugly dog, an ugly dog" in said
    found = [Image.open(path) for path in sorted(Path("p").glob("0*.png"))]
    assert [picture.text["prompt"] for picture in found] == hostile  # type: ignore[attr-defined]
    Path("unseen.jsonl").write_text('{"prompt": "a cat", "split": "unseen"}')
    assert run(["sample", "--prompts", "unseen.jsonl", "--out", "q", *FAST]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        ([], "there is no prompt to draw", 2),
        (["caf\udce9"], "the prompt 'caf\\udce9' is no UTF-8 text", 2),
        (["a cat", "--negative-prompt", "caf\udce9"], "the negative prompt 'caf\\udce9' is no UTF-8 text", 2),
        (["a cat", "--seeds", "4:2"], "LAST above FIRST", 2),
        (["a cat", "--seeds", "x"], "cannot be read", 2),
        (["a cat", "--lora", "nowhere"], "there is no LoRA 'nowhere'", 2),
        (["a cat", "--lora", "x:nan"], "is no LoRA with a weight", 2),
        (["a cat", "--size", "63"], "is not a positive multiple of 4", 2),
        (["a cat", "--safety-checker"], "without a safety checker", 1),
        (["a cat", "--prompts", "nowhere.txt"], "there is no file", 2),
        (["a cat", "--steps", "0"], "--steps 0 is not between 1 and 1000", 2),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sample", *arguments, "--model", "tiny", "--out", "p"]) == code
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert not Path("p").exists() or not list(Path("p").iterdir())


def test_seeds() -> None:
    assert parse_seeds("7") == [7]
    assert parse_seeds("0:3,9, 11") == [0, 1, 2, 9, 11]
    for text in ("", "-1", "1:", "0:200000", "1..3"):
        with pytest.raises(UsageError):
            parse_seeds(text)


def test_nonsense_in_the_header_of_a_lora_is_passed_over(lora: str) -> None:
    import safetensors.torch

    file = Path("a/adapter/pytorch_lora_weights.safetensors")
    weights = safetensors.torch.load_file(file)
    for header in ("[1]", "{", '{"base": "tiny", "base_hash": "x", "steps": "many", "guidance": null, "eta": -1}'):
        file.write_bytes(lora_bytes(weights, {"texforce": header, "lora_adapter_metadata": "[1]"}))
        assert run(["sample", "a cat", "--lora", lora, "--out", "p", "--steps", "2", "--force", "--model", "tiny"]) == 0


@pytest.mark.parametrize("base", ["somebody/model", "../models/x", "sd15"])
def test_a_header_does_not_choose_what_is_downloaded(lora: str, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    import safetensors.torch

    file = Path("a/adapter/pytorch_lora_weights.safetensors")
    about = {"base": base, "base_kind": "folder" if base == "sd15" else "hub"}
    file.write_bytes(lora_bytes(safetensors.torch.load_file(file), {"texforce": json.dumps(about)}))
    assert run(["sample", "a cat", "--lora", lora, "--out", "p"]) == 2
    assert f"was trained on '{base}'; say where that is with --model" in capsys.readouterr().err


def test_a_lora_that_does_not_fit_leaves_no_picture(lora: str, capsys: pytest.CaptureFixture[str]) -> None:
    import safetensors.torch

    file = Path("a/adapter/pytorch_lora_weights.safetensors")
    weights = {k: v[:, :7].contiguous() if "lora_A" in k else v for k, v in safetensors.torch.load_file(file).items()}
    file.write_bytes(lora_bytes(weights, {}))
    assert run(["sample", "a cat", "--model", "tiny", "--lora", lora, "--compare", "--out", "p"]) == 1
    error = capsys.readouterr().err
    assert "another base model" in error and "size mismatch" not in error.replace("(", "").split("another")[1]
    assert not Path("p").exists()


def test_a_lora_of_stable_diffusion_asks_for_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    weights = {f"{layer}.lora_A.weight": torch.ones(2, 768), f"{layer}.lora_B.weight": torch.ones(1280, 2)}
    Path("style.safetensors").write_bytes(lora_bytes(weights, {}))
    assert run(["sample", "a cat", "--lora", "style.safetensors", "--device", "cpu", "--out", "p"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "'style.safetensors' is for SD 1.x, not for 'tiny' (on cpu the default is the embedded model)" in said
    assert "name its model with --model" in said


def test_equal_prompts_and_seeds_are_drawn_once() -> None:
    assert run(["sample", "a cat", "a cat", "--seeds", "1,1", "--out", "p", "--grid", *FAST]) == 0
    assert sorted(path.name for path in Path("p").iterdir()) == ["000-a-cat-seed1.png", "grid.png"]


def test_a_prompt_set_by_name_fits_the_model() -> None:
    assert run(["sample", "--prompts", "hand", "--out", "p", "--model", "tiny", "--steps", "1", "--batch", "32"]) == 0
    assert len(list(Path("p").iterdir())) == 38


def test_a_fused_file_draws_what_its_sources_draw_stacked(tmp_path: Path) -> None:
    """fuse == stack, to a level of rounding of one of 255."""
    sources = []
    for seed in (1, 2):
        pipeline = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32")
        adapter = Adapter.insert(pipeline, "both", rank=2, alpha=2, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        (tmp_path / f"{seed}.safetensors").write_bytes(lora_bytes(adapter.export(), {}))
        sources.append(str(tmp_path / f"{seed}.safetensors"))
    weighted = [f"{sources[0]}:0.7", f"{sources[1]}:te=-0.3,unet=0.5"]
    fused = str(tmp_path / "fused.safetensors")
    assert run(["fuse", *weighted, "--out", fused]) == 0
    pictures = {}
    for name, loras in (("stack", weighted), ("fused", [fused]), ("one", weighted[:1])):
        flags = [flag for lora in loras for flag in ("--lora", lora)]
        assert run(["sample", "a cat", "--model", "tiny", "--seeds", "0:3", "--out", str(tmp_path / name), *flags]) == 0
        files = sorted((tmp_path / name).glob("*.png"))
        pictures[name] = np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)
    assert np.abs(pictures["stack"] - pictures["fused"]).max() <= 1
    assert np.abs(pictures["stack"] - pictures["one"]).max() > 20
