"""A LoRA of the difference of two models, and whole weights in place of the model's own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from lora_files import attention_layers, close, deltas, peak_of
from PIL import Image

from texforce_cli.cli import app
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.lora.full import open_full
from texforce_cli.lora.read import read_lora
from texforce_cli.tiny import WEIGHTS
from texforce_cli.workflows import extract as extracting
from texforce_cli.workflows.events import Warned
from texforce_cli.workflows.extract import ExtractRequest, extract
from texforce_cli.workflows.fuse import FuseRequest, fuse, plan_fuse
from texforce_cli.workflows.loras import weights_of

UNET = WEIGHTS / "unet" / "diffusion_pytorch_model.safetensors"
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
CONV = "mid_block.resnets.0.conv1.weight"


def changed(folder: Path, changes: dict[str, float], part: str = "unet") -> Path:
    """A copy of a part of the embedded model in which some weights have noise of a standard deviation."""
    source = next((WEIGHTS / part).glob("*.safetensors"))
    weights = {key: value.float() for key, value in safetensors.torch.load_file(source).items()}
    generator = torch.Generator().manual_seed(0)
    for name, size in changes.items():
        weights[name] += size * torch.randn(weights[name].shape, generator=generator)
    folder.mkdir(parents=True)
    safetensors.torch.save_file(weights, folder / source.name)
    return folder


def difference(tuned: Path, name: str) -> Any:
    own, theirs = (safetensors.torch.load_file(path)[name].double() for path in (UNET, tuned / UNET.name))
    return (theirs - own).numpy()


def test_the_difference_becomes_the_closest_lora(tmp_path: Path) -> None:
    tuned = changed(tmp_path / "tuned", {QUERY: 0.1, CONV: 0.05})
    result = extract(ExtractRequest(str(UNET), str(tuned), tmp_path / "out.safetensors", rank=8))
    found = deltas(tmp_path / "out.safetensors")
    assert found.keys() == {f"unet.{name.removesuffix('.weight')}" for name in (QUERY, CONV)}
    best = whole = 0.0
    for name in (QUERY, CONV):
        exact = difference(tuned, name)
        exact = exact.reshape(len(exact), -1)
        off = np.sum((found[f"unet.{name.removesuffix('.weight')}"] - exact) ** 2)
        optimum = np.sum(np.linalg.svd(exact, compute_uv=False)[8:] ** 2)
        assert off == pytest.approx(optimum, rel=1e-5)
        best, whole = best + optimum, whole + np.sum(exact**2)
    assert result.error == pytest.approx((best / whole) ** 0.5, rel=1e-6)
    assert (result.modules, result.rest, result.left_out) == (2, 0.0, ())
    kernels = {name: module.kernel for name, module in read_lora(str(tmp_path / "out.safetensors")).modules.items()}
    assert kernels == {f"unet.{QUERY.removesuffix('.weight')}": (), f"unet.{CONV.removesuffix('.weight')}": (3, 3)}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_error_that_is_told_is_that_of_the_file(tmp_path: Path, precision: Any) -> None:
    """A change of low rank loses nothing in the truncation: all the error comes from storing."""
    tuned = changed(tmp_path / "tuned", {})
    weights = safetensors.torch.load_file(tuned / UNET.name)
    rows, columns = weights[QUERY].shape
    weights[QUERY] += torch.outer(torch.linspace(-1, 1, rows), torch.linspace(0.3, 1, columns))
    safetensors.torch.save_file(weights, tuned / UNET.name)
    out = tmp_path / "out.safetensors"
    result = extract(ExtractRequest(str(UNET), str(tuned), out, rank=1, precision=precision))
    exact = difference(tuned, QUERY)
    off = np.linalg.norm(deltas(out)[f"unet.{QUERY.removesuffix('.weight')}"] - exact) / np.linalg.norm(exact)
    assert result.error == result.worst[1] == pytest.approx(off, rel=1e-6)
    low, high = {"fp32": (0, 1e-6), "fp16": (1e-5, 1e-3), "bf16": (1e-4, 5e-3)}[precision]
    assert low < off < high
    told = json.loads(read_lora(str(out)).metadata["texforce.extract"])
    assert told["relative_error"] < 1e-6  # of the truncation


def test_what_is_read_back_is_compared_with_the_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that was written a little wrong is found, however small it is beside the others."""
    tuned = changed(tmp_path / "tuned", {QUERY: 1e-3, CONV: 0.1})
    real = extracting.truncated_svd

    def slightly_wrong(delta: Any, rank: int) -> Any:
        (a, b), spectrum = real(delta, rank)
        return (a, b if delta.shape[1] > delta.shape[0] else b * 1.2), spectrum

    monkeypatch.setattr(extracting, "truncated_svd", slightly_wrong)
    with pytest.raises(TexforceError, match=r"attn1.to_q' in .* would be further from the difference than it should"):
        extract(ExtractRequest(str(UNET), str(tuned), tmp_path / "out.safetensors", rank=8))
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_a_change_of_low_rank_is_found_whole_and_draws_the_same(tmp_path: Path, capsys: Any) -> None:
    """Full weights with --unet, and the LoRA of their difference with --lora, give the same pictures."""
    tuned = changed(tmp_path / "tuned", {})
    weights = safetensors.torch.load_file(tuned / UNET.name)
    generator = torch.Generator().manual_seed(0)
    name = [name for name in weights if name.endswith("attn2.to_out.0.weight")][-1]
    rows, columns = weights[name].shape
    weights[name] += torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator) * 0.5
    safetensors.torch.save_file(weights, tuned / UNET.name)
    lora = tmp_path / "lora.safetensors"
    arguments = ["fuse", "--extract", str(WEIGHTS), str(tuned), "--rank", "2", "--out", str(lora), "--json"]
    assert app.run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["result"]["error"] < 1e-6
    for name, option in (("a", ["--unet", str(tuned)]), ("b", ["--lora", str(lora)]), ("base", [])):
        draw = ["sample", "a red cat", "--model", "tiny", "--seeds", "3", "--out", str(tmp_path / name), *option]
        assert app.run(draw) == 0
    a, b, base = (np.asarray(Image.open(next((tmp_path / n).glob("*.png")))).astype(int) for n in ("a", "b", "base"))
    assert np.abs(a - b).max() <= 2
    assert np.abs(a - base).max() > 20
    with Image.open(next((tmp_path / "a").glob("*.png"))) as image:
        about = image.info
    assert about["unet"] == "tuned" and about["precision"] == "fp32" and about["drawn_by"].endswith(" on cpu")
    assert json.loads(about["weights"]) == {"unet": [hashlib.sha256((tuned / UNET.name).read_bytes()).hexdigest()]}


@pytest.mark.slow
def test_an_evaluation_draws_with_whole_weights_of_both_parts_what_it_draws_with_their_loras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for part, ending in (("unet", "attn2.to_out.0.weight"), ("text_encoder", "self_attn.q_proj.weight")):
        tuned = changed(Path("tuned") / part, {}, part)
        file = next(tuned.glob("*.safetensors"))
        weights = safetensors.torch.load_file(file)
        name = [name for name in sorted(weights) if name.endswith(ending)][-1]
        rows, columns = weights[name].shape
        weights[name] += 5 * torch.outer(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns))
        safetensors.torch.save_file(weights, file)
        assert app.run(["fuse", "--extract", str(WEIGHTS), "tuned", "--rank", "1", "--out", f"{part}.safetensors"]) == 0
        shutil.move(tuned, f"{part}-tuned")
        shutil.rmtree("tuned")
    Path("v.toml").write_text(
        '[[variants]]\nname = "whole"\nmodel = "tiny"\nunet = "unet-tuned"\ntext_encoder = "text_encoder-tuned"\n'
        '[[variants]]\nname = "loras"\nmodel = "tiny"\nloras = ["unet.safetensors", "text_encoder.safetensors"]\n'
        '[[variants]]\nname = "unet"\nmodel = "tiny"\nunet = "unet-tuned"\n'
        '[[variants]]\nname = "text"\nmodel = "tiny"\ntext_encoder = "text_encoder-tuned"\n'
    )
    Path("p.txt").write_text("a red cat\n")
    command = "eval --variants v.toml --prompts p.txt --seeds 3 --steps 2 --guidance 3 --metric brightness --out out"
    assert app.run(command.split()) == 0
    drawn = {}
    for name in ("whole", "loras", "unet", "text"):
        with Image.open(next(Path("out/pictures", name).glob("*.png"))) as image:
            drawn[name] = np.asarray(image).astype(int)
    assert np.abs(drawn["whole"] - drawn["loras"]).max() <= 2
    assert all(np.abs(drawn["whole"] - drawn[name]).max() > 10 for name in ("unet", "text"))


def test_what_a_lora_cannot_hold_is_listed_with_its_share_and_refused_above_a_limit(tmp_path: Path) -> None:
    tuned = changed(tmp_path / "tuned", {QUERY: 0.1, "conv_in.bias": 0.5, "conv_norm_out.weight": 0.1})
    request = ExtractRequest(str(UNET), str(tuned), tmp_path / "out.safetensors", rank=4)
    with pytest.raises(
        TexforceError, match=r"lies in biases, norms and embeddings \(unet.conv_in.bias, unet.conv_norm_out"
    ):
        extract(request)
    assert not (tmp_path / "out.safetensors").exists()
    result = extract(ExtractRequest(str(UNET), str(tuned), tmp_path / "out.safetensors", rank=4, max_rest=0.5))
    squares = {name: np.sum(difference(tuned, name) ** 2) for name in (QUERY, "conv_in.bias", "conv_norm_out.weight")}
    assert [name for name, _ in result.left_out] == ["unet.conv_in.bias", "unet.conv_norm_out.weight"]
    assert result.left_out[0][1] == pytest.approx(squares["conv_in.bias"] / sum(squares.values()), rel=1e-6)


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    encoder = str(WEIGHTS / "text_encoder")
    same = changed(tmp_path / "same", {})
    with pytest.raises(TexforceError, match="are the same"):
        extract(ExtractRequest(str(UNET), str(same), out, rank=4))
    with pytest.raises(TexforceError, match="give two models with the same part"):
        extract(ExtractRequest(encoder, str(same), out, rank=4))
    weights = safetensors.torch.load_file(same / UNET.name)
    safetensors.torch.save_file({k: v for k, v in weights.items() if k != QUERY}, same / UNET.name)
    with pytest.raises(TexforceError, match=rf"has 'unet.{QUERY}' and '.*' has not"):
        extract(ExtractRequest(str(UNET), str(same), out, rank=4))
    safetensors.torch.save_file({**weights, QUERY: torch.ones(2, 2)}, same / UNET.name)
    with pytest.raises(TexforceError, match=rf"'unet.{QUERY}' is .* in the two models"):
        extract(ExtractRequest(str(UNET), str(same), out, rank=4))
    assert not out.exists()


def test_models_whose_parts_are_of_two_bases_are_one_sentence(tmp_path: Path, capsys: Any) -> None:
    for folder, value in (("base", 0.0), ("tuned", 1.0)):
        for part, key, width in (
            ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj.weight", 1024),
            ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 768),
        ):
            (tmp_path / folder / part).mkdir(parents=True)
            weights = {key: torch.full((2, width), value)}
            safetensors.torch.save_file(weights, tmp_path / folder / part / "model.safetensors")
    models = [str(tmp_path / name) for name in ("base", "tuned")]
    assert app.run(["fuse", "--extract", *models, "--rank", "2", "--out", str(tmp_path / "out.safetensors")]) == 1
    said = capsys.readouterr().err
    assert (
        "the model mixes base models ('text_encoder.text_model.encoder.layers.0.self_attn.q_proj' is of SD 2.x" in said
    )
    assert len(said.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


SMALL = {
    "unet": {"conv_in.weight": (4, 2, 3, 3), "mid_block.attentions.0.proj_in.weight": (4, 4)},
    "text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj.weight": (6, 6)},
}
"""Shapes of the weights of a small model by its parts."""


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_a_difference_is_written_in_every_form(tmp_path: Path, form: Any) -> None:
    generator, wanted = torch.Generator().manual_seed(0), {}
    for part, shapes in SMALL.items():
        base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        tuned = {name: value + torch.randn(value.shape, generator=generator) for name, value in base.items()}
        for folder, weights in (("base", base), ("tuned", tuned)):
            (tmp_path / folder / part).mkdir(parents=True)
            safetensors.torch.save_file(weights, tmp_path / folder / part / "model.safetensors")
        wanted |= {f"{part}.{name.removesuffix('.weight')}": (tuned[name] - base[name]).numpy() for name in base}
    out = tmp_path / ("out" if form == "peft" else "out.safetensors")
    models = [str(tmp_path / name) for name in ("base", "tuned")]
    result = extract(ExtractRequest(*models, out, rank=6, format=form))
    assert result.error < 1e-6
    assert close(deltas(out), wanted)
    fuse(plan_fuse(FuseRequest([str(out)], out=tmp_path / "again.safetensors")))
    told = json.loads(read_lora(str(tmp_path / "again.safetensors")).metadata["texforce.fuse"])
    extracted = told["sources"][0]["extracted from"]
    assert (extracted["base"], extracted["tuned"], extracted["rank"]) == ("base", "tuned", 6)
    files = [tmp_path / "tuned" / part / "model.safetensors" for part in sorted(SMALL)]
    assert extracted["sha256"]["tuned"] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.mark.parametrize(("width", "where"), [(1280, "any"), (6, "text_encoder_2")])
def test_the_second_encoder_of_sdxl_alone_is_known_by_its_folder_or_its_width(
    tmp_path: Path, width: int, where: str
) -> None:
    name = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    models = [tmp_path / "sdxl" / "text_encoder_2", tmp_path / "tuned" / where]
    for value, folder in enumerate(models):
        folder.mkdir(parents=True)
        bias = {"text_model.final_layer_norm.bias": torch.zeros(width)}
        safetensors.torch.save_file(bias | {name: torch.full((2, width), float(value))}, folder / "model.safetensors")
    files = [str(folder / "model.safetensors") for folder in models]
    extract(ExtractRequest(*files, tmp_path / "out", rank=1, format="peft"))
    assert close(deltas(tmp_path / "out"), {f"text_encoder_2.{name.removesuffix('.weight')}": np.ones((2, width))})


@pytest.mark.slow
def test_large_models_are_streamed(tmp_path: Path) -> None:
    """Two of 335 MB, of layers of 17 MB each, in a process of their own."""
    rows, columns, layers = 64, 65536, 20
    size = rows * columns * 4
    header = {
        f"{layer}.weight": {
            "dtype": "F32",
            "shape": [rows, columns],
            "data_offsets": [index * size, (index + 1) * size],
        }
        for index, layer in enumerate(attention_layers(layers))
    }
    text = json.dumps(header).encode()
    models, out = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned")], tmp_path / "out.safetensors"
    for model, value in zip(models, (0.0, 1.0)):
        with model.open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + layers * size)  # zeros that take no place on the disk
            for index in range(layers):
                handle.seek(8 + len(text) + index * size)
                handle.write(np.float32(value).tobytes())
    peak = peak_of(["fuse", "--extract", *map(str, models), "--rank", "1", "--out", str(out)])
    assert len(read_lora(str(out)).modules) == layers
    assert peak < 300e6 + 5 * size


def test_whole_weights_in_a_pickle_are_read_where_that_is_allowed(tmp_path: Path) -> None:
    weights = {name: torch.ones(shape) for name, shape in SMALL["unet"].items()}
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    for source in (tmp_path, tmp_path / "diffusion_pytorch_model.bin"):
        with pytest.raises(UsageError, match=r"diffusion_pytorch_model.bin' is a pickle.*add --allow-pickle"):
            open_full(str(source))
        found = open_full(str(source), allow_pickle=True)
        assert set(found.places) == {f"unet.{name}" for name in weights}
        assert np.array_equal(found.read("unet.conv_in.weight"), np.ones((4, 2, 3, 3)))


def test_what_is_not_compared_is_told(tmp_path: Path) -> None:
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        keys = ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x.weight", "model_ema.y")
        safetensors.torch.save_file({key: torch.full((2, 2), value) for key in keys}, tmp_path / f"{name}.safetensors")
    told: list[Any] = []
    models = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    extract(ExtractRequest(*models, tmp_path / "out.safetensors", rank=1), told.append)
    said = [event.text for event in told if isinstance(event, Warned)]
    assert said == [f"weights under '{prefix}' are not compared" for prefix in ("first_stage_model.", "model_ema.")]


def test_a_part_that_one_model_holds_alone_is_told(tmp_path: Path) -> None:
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        keys = ["model.diffusion_model.input_blocks.0.0.weight"]
        if name == "tuned":
            keys.append("cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight")
        safetensors.torch.save_file({key: torch.full((2, 2), value) for key in keys}, tmp_path / f"{name}.safetensors")
    told: list[Any] = []
    models = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    extract(ExtractRequest(*models, tmp_path / "out.safetensors", rank=1), told.append)
    said = [event.text for event in told if isinstance(event, Warned)]
    assert said == [f"the text_encoder of '{models[1]}' is not compared: the other model holds none"]


def test_an_encoder_that_could_be_of_two_bases_is_told(tmp_path: Path) -> None:
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        weights = {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.full((2, 768), value)}
        safetensors.torch.save_file(weights, tmp_path / f"{name}.safetensors")
    told: list[Any] = []
    models = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    extract(ExtractRequest(*models, tmp_path / "out.safetensors", rank=1), told.append)
    said = [event.text for event in told if isinstance(event, Warned)]
    assert said == ["nothing tells whether these are of SD 1.x or SDXL, which have the same shapes"]


@pytest.mark.parametrize("source", ["~nobody-of-that-name/x", "x" * 300, "a\0b"])
def test_a_path_that_cannot_be_is_one_sentence(source: str) -> None:
    with pytest.raises(UsageError, match=r"cannot be looked at|there is no folder or file"):
        open_full(source)


def test_an_index_without_an_end_is_one_sentence(tmp_path: Path) -> None:
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map":' * 5000)
    with pytest.raises(TexforceError, match=r"index.json' cannot be read"):
        open_full(str(tmp_path))
    index.write_text('{"weight_map": {"conv_in.weight": "pipe.safetensors"}}')
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(UsageError, match="is a pipe or a device"):
        open_full(str(tmp_path))


def test_full_weights_are_read_from_every_place(tmp_path: Path) -> None:
    """A pipeline's folder, a component's, a file, shards, and the original layout with its names."""
    whole = open_full(str(WEIGHTS))
    assert whole.components == ("text_encoder", "unet")
    unet = open_full(str(UNET))
    assert set(unet.places) == {name for name in whole.places if name.startswith("unet.")}
    weights = safetensors.torch.load_file(UNET)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    halves = [dict(list(weights.items())[:100]), dict(list(weights.items())[100:])]
    for index, half in enumerate(halves):
        safetensors.torch.save_file(half, sharded / f"part{index}.safetensors")
    table = {"weight_map": {key: f"part{index}.safetensors" for index, half in enumerate(halves) for key in half}}
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(table))
    assert set(open_full(str(sharded)).places) == set(unet.places)
    variant = (sharded / "diffusion_pytorch_model.safetensors.index.json").rename(
        sharded / "diffusion_pytorch_model.safetensors.index.fp16.json"  # as save_pretrained(variant="fp16") calls it
    )
    assert set(open_full(str(sharded)).places) == set(unet.places)
    variant.unlink()
    table["weight_map"]["x"] = "../../elsewhere.safetensors"
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(table))
    with pytest.raises(TexforceError, match="names files outside of its folder"):
        open_full(str(sharded))
    original = {
        "model.diffusion_model.input_blocks.0.0.weight": "unet.conv_in.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight": "unet.down_blocks.0.resnets.0.norm1.weight",
        "model.diffusion_model.middle_block.1.norm.bias": "unet.mid_block.attentions.0.norm.bias",
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm2.weight": (
            "unet.up_blocks.3.attentions.2.transformer_blocks.0.norm2.weight"
        ),
        "model.diffusion_model.out.0.weight": "unet.conv_norm_out.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": "text_encoder.text_model.final_layer_norm.bias",
    }
    beside = [
        "first_stage_model.x.weight",
        "model_ema.y",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
    ]
    safetensors.torch.save_file({key: torch.ones(2) for key in [*original, *beside]}, tmp_path / "sd.safetensors")
    assert set(open_full(str(tmp_path / "sd.safetensors")).places) == set(original.values())


def test_a_checkpoint_of_2022_has_its_text_encoder(tmp_path: Path) -> None:
    keys = ["encoder.layers.0.mlp.fc1.bias", "embeddings.token_embedding.weight", "final_layer_norm.bias"]
    keys = ["model.diffusion_model.out.0.weight", *(f"cond_stage_model.transformer.{key}" for key in keys)]
    safetensors.torch.save_file({key: torch.ones(2) for key in keys}, tmp_path / "v1.safetensors")
    found = open_full(str(tmp_path / "v1.safetensors"))
    assert found.components == ("text_encoder", "unet") and not found.elsewhere
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.bias" in found.places


def test_the_text_encoder_of_an_sd2_checkpoint_has_to_be_converted(tmp_path: Path) -> None:
    keys = ["model.diffusion_model.out.0.weight", "cond_stage_model.model.ln_final.weight"]
    safetensors.torch.save_file({key: torch.ones(2) for key in keys}, tmp_path / "v2.safetensors")
    with pytest.raises(TexforceError, match=r"holds no text_encoder, but unet; .* convert it to a diffusers folder"):
        weights_of("text_encoder", str(tmp_path / "v2.safetensors"))


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_weights_that_do_not_fit_the_model_are_one_sentence(tmp_path: Path, capsys: Any, component: str) -> None:
    flag = f"--{component.replace('_', '-')}"
    draw = ["sample", "a cat", "--model", "tiny", "--out", str(tmp_path / "out"), flag]
    other = {"unet": "text_encoder", "text_encoder": "unet"}[component]
    assert app.run([*draw, str(WEIGHTS / other)]) == 1
    assert f"holds no {component}, but {other}" in capsys.readouterr().err
    copy = tmp_path / component
    shutil.copytree(WEIGHTS / component, copy)
    file = next(copy.glob("*.safetensors"))
    weights = safetensors.torch.load_file(file)
    removed = sorted(weights)[0]
    safetensors.torch.save_file({key: value for key, value in weights.items() if key != removed}, file)
    assert app.run([*draw, str(copy)]) == 1
    assert "and" in (err := capsys.readouterr().err)
    assert "has not; give weights of the same kind of model" in err
    assert app.run([*draw, str(tmp_path / "none")]) == 2
    assert not list((tmp_path / "out").glob("*.png"))
