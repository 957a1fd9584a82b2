"""`texforce fuse` through the real command: exact sums, every format out, provenance, and nothing left behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import (
    FORMATS,
    SGM,
    TEXT,
    UNET,
    Made,
    attention_layers,
    close,
    deltas,
    diffusers_old,
    kohya,
    kohya_sdxl,
    peak_of,
    peft_folder,
)
from peft import PeftModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from texforce_cli import __version__
from texforce_cli.cli import app, console
from texforce_cli.errors import Interrupted, TexforceError, UsageError
from texforce_cli.lora.names import parse_key
from texforce_cli.lora.read import read_lora
from texforce_cli.lora.write import size_of
from texforce_cli.tensorfile import TensorFile
from texforce_cli.tiny import WEIGHTS
from texforce_cli.workflows import fuse as fusing
from texforce_cli.workflows.fuse import FuseRequest, fuse, plan_fuse
from texforce_cli.workflows.loras import trained_on

LAYER = f"unet.{UNET}.to_v"


def fused(out: Path, *sources: Any, **options: Any) -> dict[str, Any]:
    """The deltas of a fusion of files, through the workflow."""
    fuse(plan_fuse(FuseRequest([str(source) for source in sources], out=out, **options)))
    return deltas(out)


def simple(path: Path, seed: int = 0, rank: int = 3, shape: tuple[int, int] = (6, 5), **metadata: str) -> Path:
    """A LoRA of two modules in diffusers' form."""
    made = Made(metadata=metadata)
    for _ in range(seed):
        made.tensors[f"pad{len(made.tensors)}"] = np.zeros(1)
    for key in (f"text_encoder.{TEXT}", f"unet.{UNET}.to_q"):
        made.add(key, f"{key}.lora_A.weight", f"{key}.lora_B.weight", rank=rank, shape=shape)
    made.tensors = {key: value for key, value in made.tensors.items() if not key.startswith("pad")}
    return made.save(path)


def total(*terms: tuple[dict[str, Any], float]) -> dict[str, Any]:
    """The sum of deltas, where a module is missing it counts as zero."""
    names = {name for delta, _ in terms for name in delta}
    return {name: sum(weight * delta[name] for delta, weight in terms if name in delta) for name in names}


def test_the_command_of_the_readme_word_for_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = deltas(simple(Path("a.safetensors"))), deltas(simple(Path("b.safetensors"), seed=1, rank=2))
    assert app.run("fuse a.safetensors:0.7 b.safetensors:0.3".split()) == 0
    assert capsys.readouterr().out == "a-0.7+b-0.3.safetensors\n"
    assert close(deltas("a-0.7+b-0.3.safetensors"), total((one, 0.7), (two, 0.3)))
    before = Path("a-0.7+b-0.3.safetensors").read_bytes()
    assert app.run("fuse a.safetensors:0.7 b.safetensors:0.3".split()) == 2
    assert "exists already" in capsys.readouterr().err
    assert app.run("fuse a.safetensors:0.7 b.safetensors:0.3 --force".split()) == 0
    assert Path("a-0.7+b-0.3.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a-0.7+b-0.3.safetensors",
        "a.safetensors",
        "b.safetensors",
    ]


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_goes_into_every_format(name: str, form: Any, tmp_path: Path) -> None:
    path, wanted = FORMATS[name](tmp_path / "x")
    out = tmp_path / ("out" if form == "peft" else "out.safetensors")
    assert close(fused(out, path, format=form), wanted)
    for precision, bound in (("fp16", 1e-3), ("bf16", 5e-3)):
        assert close(fused(out, path, format=form, precision=precision, force=True), wanted, bound)


@pytest.mark.skipif(os.name != "posix", reason="a file keeps its number when it is renamed")
@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_the_weights_are_on_the_disk_before_they_have_their_name(
    form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = FORMATS["diffusers"](tmp_path / "x")
    out = tmp_path / ("out" if form == "peft" else "out.safetensors")
    real, synced = os.fsync, set[int]()

    def fsync(descriptor: int) -> None:
        if not out.exists():
            synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    fuse(plan_fuse(FuseRequest([str(path)], out=out, format=form)))
    files = [file for file in (out, *out.rglob("*")) if file.is_file()]
    assert files and {file.stat().st_ino for file in files} <= synced


COMFYUI = {  # spelled out from ComfyUI's published map (comfy/lora.py, comfy/utils.py: unet_to_diffusers)
    "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
    "lora_unet_conv_in",
    "lora_unet_conv_out",
    "lora_unet_time_embedding_linear_1",
    "lora_unet_time_embedding_linear_2",
    "lora_unet_down_blocks_0_resnets_0_conv1",
    "lora_unet_down_blocks_0_resnets_1_time_emb_proj",
    "lora_unet_down_blocks_0_downsamplers_0_conv",
    "lora_unet_down_blocks_1_resnets_0_conv_shortcut",
    "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn1_to_out_0",
    "lora_unet_down_blocks_2_attentions_1_proj_in",
    "lora_unet_mid_block_resnets_1_conv2",
    "lora_unet_up_blocks_0_upsamplers_0_conv",
    "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_0_proj",
    "lora_unet_up_blocks_3_attentions_0_transformer_blocks_0_attn2_to_v",
    "lora_unet_up_blocks_3_attentions_1_transformer_blocks_0_ff_net_2",
}


def test_kohya_out_has_one_alpha_and_the_names_that_comfyui_looks_up(tmp_path: Path) -> None:
    made = Made()
    for name in COMFYUI:
        place = parse_key(f"{name}.alpha")
        assert place is not None
        made.add(place.module, *(f"{place.module}.lora_{x}.weight" for x in "AB"))
    fused(tmp_path / "sd.safetensors", made.save(tmp_path / "a.safetensors"), format="kohya")
    assert {key.partition(".")[0] for key in TensorFile.open(tmp_path / "sd.safetensors").entries} == COMFYUI
    fused(tmp_path / "conv.safetensors", kohya(tmp_path / "y")[0], format="kohya")
    found = safetensors.numpy.load_file(tmp_path / "conv.safetensors")
    assert len({float(value) for key, value in found.items() if key.endswith(".alpha")}) == 1
    assert found["lora_unet_up_blocks_2_upsamplers_0_conv.lora_down.weight"].shape[2:] == (3, 3)
    assert found["lora_unet_up_blocks_2_upsamplers_0_conv.lora_up.weight"].shape[2:] == (1, 1)


def test_a_small_layer_beside_a_large_one_keeps_its_precision_in_kohyas_form(tmp_path: Path) -> None:
    """Its share of the one alpha, a 32nd, is divided between its factors: in one it would be below what fp16 holds exactly."""
    made = Made()
    for key, rank in ((f"unet.{UNET}.to_q", 128), (f"unet.{UNET}.to_v", 128), (f"text_encoder.{TEXT}", 4)):
        made.add(key, *(f"{key}.lora_{x}.weight" for x in "AB"), rank=rank, shape=(128, 128))
    for x in "AB":
        made.tensors[f"text_encoder.{TEXT}.lora_{x}.weight"] *= np.float32(4e-4)
    source = made.save(tmp_path / "a.safetensors")
    found = fused(tmp_path / "out.safetensors", source, format="kohya", precision="fp16")
    exact = deltas(source)
    for name, delta in exact.items():
        assert np.linalg.norm(found[name] - delta) < 1e-3 * np.linalg.norm(delta)


def test_sdxl_in_kohyas_form_has_the_names_of_the_original_code_and_none_besides(tmp_path: Path) -> None:
    """A1111 (networks.py: `lora_unet` -> `diffusion_model`) and ComfyUI look up the very modules of it; diffusers drops them
    where names of its own are among them."""
    source, wanted = kohya_sdxl(tmp_path / "x")
    fused(tmp_path / "a.safetensors", source)  # in the names of diffusers
    assert close(fused(tmp_path / "b.safetensors", tmp_path / "a.safetensors", format="kohya"), wanted)
    files = [TensorFile.open(tmp_path / f"{name}.safetensors") for name in "ab"]
    told = [file.metadata["modelspec.implementation"] for file in files]
    assert told == ["diffusers", "https://github.com/Stability-AI/generative-models"]
    found = {key.partition(".")[0] for key in files[1].entries}
    text = {f"lora_{te}_text_model_encoder_layers_1_self_attn_q_proj" for te in ("te1", "te2")}
    assert found == text | {f"lora_unet_{name}" for name in SGM}


@pytest.mark.parametrize(
    ("text", "cross", "prefix", "version", "architecture"),
    [
        (768, 768, "lora_te_", "sd_v1", "stable-diffusion-v1/lora"),
        (1024, 1024, "lora_te_", "sd_v2", "stable-diffusion-v2-512/lora"),
        (768, 2048, "lora_te1_", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_base_decides_the_names_of_the_encoder_in_kohyas_form_and_stands_in_the_header(
    tmp_path: Path, text: int, cross: int, prefix: str, version: str, architecture: str
) -> None:
    """Told by the widths alone, without the second encoder."""
    made = Made()
    for key, width in ((f"text_encoder.{TEXT}", text), (f"unet.{UNET}.to_k", cross)):
        made.add(key, *(f"{key}.lora_{x}.weight" for x in "AB"), shape=(6, width))
    source = made.save(tmp_path / "a.safetensors")
    assert close(fused(tmp_path / "out.safetensors", source, format="kohya"), made.wanted)
    file = TensorFile.open(tmp_path / "out.safetensors")
    names = {key.partition(".")[0] for key in file.entries if key.startswith("lora_te")}
    assert names == {f"{prefix}text_model_encoder_layers_1_self_attn_q_proj"}
    assert file.metadata["ss_base_model_version"] == version
    assert file.metadata["modelspec.architecture"] == architecture


def test_a_header_that_names_another_base_than_the_shapes_is_not_believed(tmp_path: Path) -> None:
    told = {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    for width, base, v2 in ((768, "sd_v1", "False"), (1024, "sd_v2", "True")):
        key = f"unet.{UNET}.to_k"
        made = Made(metadata=dict(told)).add(key, *(f"{key}.lora_{x}.weight" for x in "AB"), shape=(6, width))
        fused(tmp_path / "out.safetensors", made.save(tmp_path / "a.safetensors"), force=True)
        header = TensorFile.open(tmp_path / "out.safetensors").metadata
        assert (header["ss_base_model_version"], header["ss_v2"]) == (base, v2)
        assert "xl" not in header["modelspec.architecture"]
    told = {"ss_base_model_version": "sd_v2"}  # of a text encoder that is SD 1.x's or SDXL's
    key = f"text_encoder.{TEXT}"
    made = Made(metadata=told).add(key, *(f"{key}.lora_{x}.weight" for x in "AB"), shape=(6, 768))
    fused(tmp_path / "out.safetensors", made.save(tmp_path / "a.safetensors"), force=True)
    assert "ss_base_model_version" not in TensorFile.open(tmp_path / "out.safetensors").metadata


def test_what_a_file_says_of_its_making_outlives_a_conversion_and_of_several_what_they_agree_on(tmp_path: Path) -> None:
    said = {"modelspec.author": "Ada", "modelspec.license": "CC-BY", "ss_tag_frequency": "{}", "ss_network_dim": "99"}
    one = simple(tmp_path / "a.safetensors", **said, **{"modelspec.title": "A"})
    other = simple(tmp_path / "b.safetensors", **{**said, "modelspec.author": "Bob"})
    fused(tmp_path / "one.safetensors", one)
    fused(tmp_path / "both.safetensors", one, other)
    header = TensorFile.open(tmp_path / "one.safetensors").metadata
    assert (header["modelspec.author"], header["ss_tag_frequency"], header["modelspec.title"]) == ("Ada", "{}", "1 a")
    assert header["ss_network_dim"] != "99"
    header = TensorFile.open(tmp_path / "both.safetensors").metadata
    assert ("modelspec.author" not in header) and header["modelspec.license"] == "CC-BY"
    sources = json.loads(header["texforce.fuse"])["sources"]
    assert [source["author"] for source in sources] == ["Ada", "Bob"]


def test_diffusers_out_has_text_model_and_nothing_that_scales_again(tmp_path: Path) -> None:
    """Whatever the source left out: ComfyUI passes over text encoders without that level."""
    for name in ("PEFT, patterns", "diffusers", "kohya, ComfyUI"):
        out = tmp_path / f"{name}.safetensors"
        fused(out, FORMATS[name](tmp_path / name)[0])
        file = TensorFile.open(out)
        assert {module.scale for module in read_lora(str(out)).modules.values()} == {1.0}
        for key in file.entries:
            assert key.endswith((".lora_A.weight", ".lora_B.weight"))
            assert key.startswith(("text_encoder.text_model.", "text_encoder_2.text_model.", "unet."))


@pytest.mark.parametrize("form", ["diffusers", "peft"])
@pytest.mark.parametrize("phase", ["fusing", "checking"])
def test_a_stop_leaves_nothing(tmp_path: Path, phase: str, form: Any) -> None:
    source = simple(tmp_path / "a.safetensors")

    def stop(event: Any) -> None:
        if getattr(event, "phase", "") == phase and event.done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        fuse(plan_fuse(FuseRequest([str(source)], out=tmp_path / "new" / "out.safetensors", format=form)), stop)
    assert list(tmp_path.iterdir()) == [source]


def test_weights_signs_components_and_disjoint_files(tmp_path: Path) -> None:
    one, two = simple(tmp_path / "a.safetensors"), kohya(tmp_path / "x")[0]
    three = diffusers_old(tmp_path / "y")[0]
    a, b, c = deltas(one), deltas(two), deltas(three)
    expected = total((a, -0.3), (b, 2.0), (c, 1.0))
    assert close(fused(tmp_path / "sum.safetensors", f"{one}:-0.3", f"{two}:2", three), expected)
    by_part = {name: (0.7 if name.startswith("text") else 0.3) * delta for name, delta in a.items()}
    assert close(fused(tmp_path / "parts.safetensors", f"{one}:te=0.7,unet=0.3"), by_part)
    text = {name: delta for name, delta in a.items() if name.startswith("text")}
    assert close(fused(tmp_path / "te.safetensors", f"{one}:unet=0"), text)
    with pytest.raises(UsageError, match="every weight is 0"):
        plan_fuse(FuseRequest([f"{one}:0"]))


def test_a_fusion_fused_again_keeps_its_lineage(tmp_path: Path) -> None:
    training = json.dumps({"base": "tiny", "base_kind": "tiny", "rewards": ["x"], "seed": 1})
    one = simple(tmp_path / "a.safetensors", texforce=training)
    two = simple(tmp_path / "b.safetensors", seed=1, texforce=training.replace('"x"', '"y"'))
    fused(tmp_path / "c.safetensors", f"{one}:0.7", f"{two}:0.3")
    fused(tmp_path / "d.safetensors", f"{tmp_path / 'c.safetensors'}:0.5", format="kohya")
    header = read_lora(str(tmp_path / "d.safetensors")).metadata
    about = json.loads(header["texforce.fuse"])
    assert about["sources"][0]["weight"] == "0.5"
    assert [source["name"] for source in about["sources"][0]["fused from"]["sources"]] == ["a", "b"]
    assert about["sources"][0]["fused from"]["sources"][1]["trained"]["rewards"] == ["y"]
    assert json.loads(header["texforce"]) == {"base": "tiny", "base_kind": "tiny", "seed": 1}
    assert about["sources"][0]["sha256"] == [hashlib.sha256((tmp_path / "c.safetensors").read_bytes()).hexdigest()]
    assert (about["method"], about["dtype"], about["texforce"]) == ("cat", "fp32", __version__)
    assert (header["ss_network_dim"], header["ss_network_alpha"], header["modelspec.title"]) == ("6", "6", "0.5 c")
    assert {"modelspec.sai_model_spec", "modelspec.description", "ss_network_module"} <= header.keys()
    assert str(tmp_path) not in json.dumps(header)


def test_what_a_truncation_left_out_is_said_and_nothing_where_it_was_nothing(tmp_path: Path, capsys: Any) -> None:
    source = str(simple(tmp_path / "a.safetensors", rank=4))
    for rank, sentence in ((9, "nothing was left out"), (1, "of the change; most in unet.")):
        command = ["fuse", source, "--rank", str(rank), "--out", str(tmp_path / f"{rank}.safetensors")]
        assert app.run(command) == 0
        assert sentence in " ".join(capsys.readouterr().err.split())


def test_large_modules_are_worked_on_by_fewer_threads(tmp_path: Path) -> None:
    """By what is read, not by what is left of it: 200 MB over eight times 8 bytes for each of the stacked numbers."""
    sources = [str(simple(tmp_path / f"{name}.safetensors", rank=4)) for name in "ab"]
    plan = plan_fuse(FuseRequest(sources, out=tmp_path / "out.safetensors", rank=1))
    largest = max(8 * (slot.inputs + slot.outputs) for slot in plan.slots)
    assert fusing._threads(plan) == int(200e6 / (64 * largest))
    module, weight = plan.terms[plan.slots[0].name][0]
    huge = dataclasses.replace(module, rank=4096)
    large = dataclasses.replace(plan, terms={**plan.terms, plan.slots[0].name: ((huge, weight),)})
    assert fusing._threads(large) == max(1, int(200e6 / (64 * 4096 * (module.inputs + module.outputs))))


def test_svd_gives_the_rank_or_the_error_that_was_asked_for(tmp_path: Path) -> None:
    one = simple(tmp_path / "a.safetensors", rank=5, shape=(40, 30))
    two = simple(tmp_path / "b.safetensors", seed=1, rank=6, shape=(40, 30))
    whole = total((deltas(one), 0.7), (deltas(two), 0.3))
    sources = [f"{one}:0.7", f"{two}:0.3"]
    result = fuse(plan_fuse(FuseRequest(sources, out=tmp_path / "s.safetensors", rank=4)))
    found = deltas(tmp_path / "s.safetensors")
    off = sum(np.sum((found[name] - whole[name]) ** 2) for name in whole)
    best = sum(np.sum(np.linalg.svd(delta, compute_uv=False)[4:] ** 2) for delta in whole.values())
    assert off == pytest.approx(best, rel=1e-4)
    assert result.truncation_error == pytest.approx((best / sum(np.sum(d**2) for d in whole.values())) ** 0.5, rel=1e-5)
    assert result.ranks == (4, 4)
    assert close(fused(tmp_path / "e.safetensors", *sources, method="svd"), whole)
    loose = fused(tmp_path / "l.safetensors", *sources, max_error=0.5)
    assert close(loose, whole, 0.5)
    ranks = {module.rank for module in read_lora(str(tmp_path / "l.safetensors")).modules.values()}
    assert max(ranks) < 11
    assert not close(loose, whole, 0.1)


def test_each_part_of_a_peft_adapter_tells_the_error_of_the_whole(tmp_path: Path) -> None:
    sources = [str(simple(tmp_path / f"{seed}.safetensors", seed, rank=2)) for seed in range(2)]
    result = fuse(plan_fuse(FuseRequest(sources, out=tmp_path / "out", rank=2, format="peft")))
    assert result.truncation_error > 0.01
    for part in ("text_encoder", "unet"):
        about = json.loads(
            TensorFile.open(tmp_path / "out" / part / "adapter_model.safetensors").metadata["texforce.fuse"]
        )
        assert about["relative_error"] == result.truncation_error


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
TERMS = st.lists(
    st.tuples(st.integers(1, 4), st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3), st.sampled_from(DTYPES)),
    min_size=1,
    max_size=3,
)
"""Rank, weight and dtype of each source."""


def written_by_torch(folder: Path, terms: list[tuple[int, float, torch.dtype]]) -> tuple[list[str], Any, float]:
    """Sources of one layer, the dense sum as torch computes it from what it stored, and the size of what adds up."""
    sources, whole, size = [], np.zeros((6, 5)), 0.0
    for index, (rank, weight, dtype) in enumerate(terms):
        generator = torch.Generator().manual_seed(index)
        a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rank, 5), (6, rank)))
        path = folder / f"{index}.safetensors"
        safetensors.torch.save_file({f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b}, path)
        sources.append(f"{path}:{weight!r}")
        whole = whole + weight * (b.double() @ a.double()).numpy()
        size += abs(weight) * float(a.double().norm() * b.double().norm())
    return sources, whole, size


@settings(max_examples=50)
@given(TERMS, st.sampled_from(["diffusers", "kohya"]), st.randoms())
def test_any_ranks_weights_and_dtypes_add_up_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, terms: list[Any], form: Any, random: Any
) -> None:
    folder = tmp_path_factory.mktemp("any")
    sources, whole, size = written_by_torch(folder, terms)
    for _ in range(2):
        found = fused(folder / "out.safetensors", *sources, format=form, force=True)[LAYER]
        assert np.linalg.norm(found - whole) <= 1e-6 * size
        random.shuffle(sources)


@settings(max_examples=50)
@given(TERMS, st.integers(1, 6))
def test_the_error_of_any_truncation_is_the_optimum_of_the_dense_sum(
    tmp_path_factory: pytest.TempPathFactory, terms: list[Any], rank: int
) -> None:
    folder = tmp_path_factory.mktemp("svd")
    sources, whole, size = written_by_torch(folder, terms)
    result = fuse(plan_fuse(FuseRequest(sources, out=folder / "out.safetensors", rank=rank)))
    optimum = np.linalg.norm(np.linalg.svd(whole, compute_uv=False)[rank:])
    written = np.linalg.norm(deltas(folder / "out.safetensors")[LAYER] - whole)
    assert written == pytest.approx(optimum, rel=1e-6, abs=1e-6 * size)
    assert result.truncation_error * np.linalg.norm(whole) == pytest.approx(optimum, rel=1e-6, abs=1e-6 * size)


def test_bf16_and_fp8_sources_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    key = f"unet.{UNET}.to_q"
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        generator = torch.Generator().manual_seed(0)
        tensors = {f"{key}.lora_{x}.weight": torch.randn(4, 4, generator=generator).to(dtype) for x in "AB"}
        safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
        a, b = (tensors[f"{key}.lora_{x}.weight"].double().numpy() for x in "AB")
        assert close(fused(tmp_path / "out.safetensors", tmp_path / "a.safetensors", force=True), {key: b @ a})


def test_small_changes_survive_half_precision(tmp_path: Path) -> None:
    """B of 1e-8 would be flushed to zero in float16; balanced against A it is not."""
    key = f"unet.{UNET}.to_q"
    made = Made().add(key, f"{key}.lora_A.weight", f"{key}.lora_B.weight")
    made.tensors[f"{key}.lora_B.weight"] *= np.float32(1e-8)
    path = made.save(tmp_path / "a.safetensors")
    assert close(fused(tmp_path / "out.safetensors", path, precision="fp16"), deltas(path), 1e-3)
    made.tensors = {name: value * np.float32(1e6) for name, value in made.tensors.items() if "lora_A" in name} | {
        name: value * np.float32(1e18) for name, value in made.tensors.items() if "lora_B" in name
    }
    huge = made.save(tmp_path / "huge.safetensors")
    with pytest.raises(TexforceError, match="do not fit into fp16; use --dtype fp32 or bf16"):
        fused(tmp_path / "huge16.safetensors", huge, precision="fp16")
    assert not (tmp_path / "huge16.safetensors").exists()


@pytest.mark.parametrize(
    ("path", "width", "dimensions"),
    [
        ("down_blocks.0.attentions.0.proj_in", 768, 4),  # a convolution in SD 1.x, linear in the others
        ("down_blocks.0.attentions.0.proj_in", 1024, 2),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 768, 2),
        ("down_blocks.0.resnets.0.conv_shortcut", 2048, 4),
    ],
)
def test_a_linear_and_a_1x1_form_of_one_layer_are_the_same_and_the_layers_own_is_written(
    tmp_path: Path, path: str, width: int, dimensions: int
) -> None:
    key, tells = f"unet.{path}", f"unet.{UNET}.to_k"
    for name, kernel in (("a", ()), ("b", (1, 1)), ("c", (3, 3))):
        made = Made().add(key, f"{key}.lora_A.weight", f"{key}.lora_B.weight", kernel=kernel)
        made.add(tells, f"{tells}.lora_A.weight", f"{tells}.lora_B.weight", shape=(6, width))
        made.save(tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    assert close(fused(tmp_path / "out.safetensors", *paths), total(*((deltas(path), 1.0) for path in paths)))
    written = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert written[f"{key}.lora_A.weight"].ndim == written[f"{key}.lora_B.weight"].ndim == dimensions
    with pytest.raises(TexforceError, match=r"different base models|which is of a convolution; that layer is none"):
        plan_fuse(FuseRequest([str(tmp_path / "a.safetensors"), str(tmp_path / "c.safetensors")]))


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, lambda a, b: (a, b + 1e-3)),
        ({"precision": "fp16"}, lambda a, b: (a, b * 1.01)),
        ({"precision": "bf16"}, lambda a, b: (a, b * 1.03)),
        ({"rank": 2}, lambda a, b: (a, b * 1.01)),
        ({"rank": 2, "precision": "bf16"}, lambda a, b: (a[:1], b[:, :1])),
    ],
)
def test_what_is_read_back_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, change: Any
) -> None:
    """A layer that was written a little wrong is found, however small it is beside the others."""
    small = Made()
    key = f"text_encoder.{TEXT}"
    small.add(key, f"{key}.lora_A.weight", f"{key}.lora_B.weight")
    small.tensors[f"{key}.lora_B.weight"] *= np.float32(1e-3)
    sources = [simple(tmp_path / "a.safetensors", rank=4), small.save(tmp_path / "b.safetensors")]
    real = fusing._fused

    def slightly_wrong(plan: Any, slot: Any) -> Any:
        pair, about = real(plan, slot)
        return change(*pair) if slot.name == key else pair, about

    monkeypatch.setattr(fusing, "_fused", slightly_wrong)
    plan_fuse(FuseRequest([str(sources[1])], out=tmp_path / "out.safetensors", **options))
    with pytest.raises(TexforceError, match=r"q_proj' in .*out.safetensors' would differ from the sum of its sources"):
        fused(tmp_path / "out.safetensors", sources[1], f"{sources[0]}:te=0", **options)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("options", "most"), [({}, 1e-6), ({"precision": "fp16"}, 1e-3), ({"precision": "bf16"}, 5e-3), ({"rank": 8}, 1e-6)]
)
def test_the_difference_of_two_that_are_nearly_alike_is_held_as_well_as_a_sum(
    tmp_path: Path, options: Any, most: float
) -> None:
    """Two epochs of one run, 1e-4 apart: each term's own rounding is as large as what is left of them."""
    one, other = (Made() for _ in range(2))
    for made in (one, other):
        made.add(f"unet.{UNET}.to_q", *(f"unet.{UNET}.to_q.lora_{x}.weight" for x in "AB"), rank=4, shape=(60, 50))
    shift = np.random.default_rng(5)
    other.tensors = {
        name: (value + 1e-4 * shift.standard_normal(value.shape)).astype(np.float32)
        for name, value in one.tensors.items()
    }
    paths = [made.save(tmp_path / f"{name}.safetensors") for name, made in (("a", one), ("b", other))]
    plan = plan_fuse(FuseRequest([f"{paths[0]}:1", f"{paths[1]}:-1"], out=tmp_path / "out.safetensors", **options))
    told = fuse(plan).measured_error
    exact = total((deltas(paths[0]), 1.0), (deltas(paths[1]), -1.0))[f"unet.{UNET}.to_q"]
    off = deltas(tmp_path / "out.safetensors")[f"unet.{UNET}.to_q"] - exact
    error = np.linalg.norm(off) / np.linalg.norm(exact)
    assert error < most
    assert told == pytest.approx(error, rel=1e-3 if "precision" in options else 3)


def test_terms_that_cancel_to_nothing_are_zero_and_what_is_twice_the_same_has_one_rank(tmp_path: Path) -> None:
    path, out = simple(tmp_path / "a.safetensors", rank=4), tmp_path / "out.safetensors"
    for options in ({}, {"max_error": 0.1}, {"precision": "fp16"}):
        assert not any(
            delta.any() for delta in fused(out, f"{path}:0.5", f"{path}:-0.5", force=True, **options).values()
        )
    nothing = fuse(plan_fuse(FuseRequest([f"{path}:{weight}" for weight in (0.1, 0.2, -0.3)], out=out, force=True)))
    assert nothing.measured_error == 0  # though 0.1 + 0.2 is no 0.3
    again = fuse(plan_fuse(FuseRequest([f"{path}:0.5"] * 2, out=out, force=True, max_error=0.0)))
    assert again.ranks == (4, 4)


def of_rank_one(path: Path, layers: int) -> Path:
    """The estimate of an error of rank 1 is between a third and two and a half times of it."""
    made, numbers = Made(), np.random.default_rng(0)
    for layer in attention_layers(layers):
        key = f"unet.{layer}"
        made.add(key, f"{key}.lora_A.weight", f"{key}.lora_B.weight", rank=1, shape=(128, 128))
    made.tensors = {name: numbers.standard_normal(v.shape).astype(np.float32) for name, v in made.tensors.items()}
    return made.save(path)


def test_a_good_file_is_not_refused_for_an_estimate(tmp_path: Path) -> None:
    path = of_rank_one(tmp_path / "a.safetensors", 400)
    result = fuse(plan_fuse(FuseRequest([f"{path}:0.7"], out=tmp_path / "out.safetensors", precision="bf16")))
    assert 1e-3 < result.measured_error < 3e-3


@pytest.mark.parametrize("layer", range(20))
def test_a_layer_that_is_off_by_a_little_more_than_it_may_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    path, real = of_rank_one(tmp_path / "a.safetensors", 20), fusing._fused

    def slightly_wrong(plan: Any, slot: Any) -> Any:
        (a, b), about = real(plan, slot)
        return (a, b * np.float32(1 + 1.5e-6) if slot == plan.slots[layer] else b), about

    monkeypatch.setattr(fusing, "_fused", slightly_wrong)
    with pytest.raises(TexforceError, match=r"is allowed; its numbers may be too small for fp32"):
        fused(tmp_path / "out.safetensors", path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"rank": 2}, {"max_error": 0.1}])
def test_a_sum_that_overflows_is_one_sentence_without_warnings(tmp_path: Path, options: Any) -> None:
    key = f"unet.{UNET}.to_q"
    made = Made().add(key, *(f"{key}.lora_{x}.weight" for x in "AB"))
    made.tensors[f"{key}.lora_B.weight"] *= np.float32(1e38)
    path = made.save(tmp_path / "a.safetensors")
    with pytest.raises(TexforceError, match=f"'{key}' holds numbers that are too large; use smaller weights"):
        fused(tmp_path / "new" / "out.safetensors", f"{path}:1000", **options)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("lists", "kept"), [(299, True), (300, False)])
def test_a_lineage_nested_as_deeply_as_no_command_writes_it_is_left_out(
    tmp_path: Path, capsys: Any, lists: int, kept: bool
) -> None:
    nested = '{"a": ' + "[" * lists + "]" * lists + ', "[[": "\\"[["}'
    path = simple(tmp_path / "a.safetensors", **{"texforce.fuse": nested})
    fused(tmp_path / "out.safetensors", path)
    about = json.loads(TensorFile.open(tmp_path / "out.safetensors").metadata["texforce.fuse"])
    assert ("fused from" in about["sources"][0]) is kept
    assert app.run(["fuse", "--inspect", "--json", str(path)]) == 0
    assert bool(json.loads(capsys.readouterr().out)["files"][0]["made_by"]) is kept


def test_a_lineage_whose_text_does_not_end_is_passed_over_at_once(tmp_path: Path) -> None:
    path = simple(tmp_path / "a.safetensors", **{"texforce.fuse": '"' + '\\"' * 20_000 + "\\"})
    before = time.perf_counter()
    fused(tmp_path / "out.safetensors", path)
    assert time.perf_counter() - before < 2


def test_inspect_says_who_made_a_file_and_of_what(tmp_path: Path, capsys: Any) -> None:
    source = simple(tmp_path / "a.safetensors", **{"modelspec.author": "Ada", "ss_sd_model_name": "photo.ckpt"})
    fused(tmp_path / "b.safetensors", f"{source}:0.5")
    for name in "ab":
        assert app.run(["fuse", "--inspect", str(tmp_path / f"{name}.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "  author: Ada\n  base model: photo.ckpt\n" in shown
    assert (
        "  title: 0.5 a\n  author: Ada\n  description: LoRAs fused by texforce\n  base model: photo.ckpt\n  texforce.fuse: {"
        in shown
    )


def test_inspect_says_what_may_be_wrong(tmp_path: Path, capsys: Any) -> None:
    folder, _ = peft_folder(tmp_path / "x")
    (folder / "adapter_config.json").unlink()
    assert app.run(["fuse", "--inspect", str(folder)]) == 0
    assert "its alpha is not known and taken to be its rank" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [[], ["--format", "kohya"], ["--format", "peft"], ["--method", "svd", "--max-error", "0"]],
    ids=str,
)
def test_a_large_file_is_streamed(tmp_path: Path, options: list[str]) -> None:
    """600 MB of layers of 4 MB each, in a process of their own, whatever it holds of each at a time."""
    rank, width, layers = 256, 2048, 150
    size = rank * width * 4
    header: dict[str, Any] = {}
    for layer in attention_layers(layers):
        for factor, shape in (("A", [rank, width]), ("B", [width, rank])):
            key = f"unet.{layer}.lora_{factor}.weight"
            start = len(header) * size
            header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}
    text = json.dumps(header).encode()
    out = tmp_path / ("b" if "peft" in options else "b.safetensors")
    with (tmp_path / "a.safetensors").open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + len(header) * size)  # zeros that take no place on the disk
    peak = peak_of(["fuse", str(tmp_path / "a.safetensors"), "--out", str(out), *options])
    assert size_of(out) > 600e6 or "svd" in options  # the lowest rank of zeros is 1
    assert peak < 250e6


def test_peft_says_how_a_pissa_becomes_a_plain_lora_and_that_is_fused(tmp_path: Path, pipeline: Any) -> None:
    """PiSSA moves a part of the base weights into the factors: only what peft converts is the change of the weights."""
    from peft import LoraConfig, get_peft_model

    before = {name: value.detach().clone().double() for name, value in pipeline.text_encoder.named_parameters()}
    wrapped = get_peft_model(
        pipeline.text_encoder, LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["q_proj"])
    )
    wrapped.peft_config["default"].init_lora_weights = True  # as peft's guide says: not to begin anew when it is loaded
    wrapped.save_pretrained(tmp_path / "initial")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path / "pissa")
    with pytest.raises(TexforceError, match=r"init_lora_weights 'pissa'.*path_initial_model_for_weight_conversion"):
        fused(tmp_path / "a.safetensors", tmp_path / "pissa")
    wrapped.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    found = fused(tmp_path / "b.safetensors", tmp_path / "plain")
    tuned = dict(wrapped.merge_and_unload().named_parameters())
    for name, delta in found.items():
        own = next(
            key for key in before if f"text_encoder.text_model.{key.removeprefix('text_model.')}" == f"{name}.weight"
        )
        change = tuned[own].detach().double() - before[own]
        assert np.allclose(delta, change.numpy(), rtol=0, atol=1e-5)
        assert change.abs().max() > 0.05


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_an_output_that_appears_while_the_sum_is_made_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    source, out = simple(tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    real = fusing._verify

    def meanwhile(*arguments: Any) -> float:
        out.write_text("theirs")
        return real(*arguments)

    monkeypatch.setattr(fusing, "_verify", meanwhile)
    with pytest.raises(UsageError, match=r"out.safetensors' has appeared meanwhile"):
        fused(out, source, format=form)
    assert out.read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "out.safetensors"]


def test_a_folder_is_looked_through_to_its_first_stranger_and_only_where_it_would_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "home"
    out.mkdir()

    def endless(self: Path, pattern: str) -> Any:
        yield self / "letters"
        raise AssertionError("read on")

    monkeypatch.setattr(Path, "rglob", endless)
    with pytest.raises(UsageError, match="home' holds 'letters', which is no part"):
        fusing.refuse_output(out, [], folder=True, force=True)
    for folder in (True, False):
        with pytest.raises(UsageError, match=r"exists already|does not end in"):
            fusing.refuse_output(out, [], folder=folder, force=False)


def test_a_folder_that_holds_anything_else_is_never_replaced(tmp_path: Path) -> None:
    source = simple(tmp_path / "a.safetensors")
    for number, stranger in enumerate(
        ["model_index.json", "unet/config.json", "text_encoder/notes.txt", "checkpoint-1/opt.pt"]
    ):
        out = tmp_path / f"out{number}"
        fused(out, source, format="peft")
        (out / stranger).parent.mkdir(exist_ok=True)
        (out / stranger).write_text("precious")
        with pytest.raises(UsageError, match="which is no part of the adapter and would be lost"):
            fused(out, source, format="peft", force=True)
        assert (out / stranger).read_text() == "precious"
    out = tmp_path / "again"
    fused(out, source, format="peft")
    with pytest.raises(UsageError, match="exists already"):
        fused(out, source, format="peft")
    assert close(fused(out, f"{source}:2", format="peft", force=True), total((deltas(source), 2.0)))
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    for name, form in (("link", "peft"), ("dangling.safetensors", "diffusers")):
        with pytest.raises(UsageError, match=r"is a folder|exists already"):
            fused(tmp_path / name, source, format=form)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    source, other = simple(tmp_path / "a.safetensors"), simple(tmp_path / "other.safetensors", seed=1)
    before = other.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(other)
    with pytest.raises(UsageError, match="exists already"):
        fused(tmp_path / "link.safetensors", source)
    assert close(fused(tmp_path / "link.safetensors", source, force=True), deltas(source))
    assert not (tmp_path / "link.safetensors").is_symlink()
    assert other.read_bytes() == before


def test_an_encoder_that_could_be_of_two_bases_is_told_even_beside_one_that_is_not(tmp_path: Path) -> None:
    text, unet = Made(), Made()
    text.add(f"text_encoder.{TEXT}", *(f"text_encoder.{TEXT}.lora_{x}.weight" for x in "AB"), shape=(6, 768))
    unet.add(f"unet.{UNET}.to_k", *(f"unet.{UNET}.to_k.lora_{x}.weight" for x in "AB"), shape=(6, 2048))
    paths = [str(text.save(tmp_path / "t.safetensors")), str(unet.save(tmp_path / "u.safetensors"))]
    said = plan_fuse(FuseRequest(paths, out=tmp_path / "o.safetensors")).warnings
    assert "t.safetensors' tells whether it is for SD 1.x or SDXL" in said[0]
    assert "taken to be SDXL as the others are" in said[0]
    assert plan_fuse(FuseRequest(paths[1:], out=tmp_path / "o.safetensors")).warnings == []


def test_an_encoder_that_could_be_of_two_bases_gets_the_name_that_is_looked_up_in_both(tmp_path: Path) -> None:
    key = "lora_te1_text_model_encoder_layers_1_self_attn_q_proj"
    made = Made().add(f"text_encoder.{TEXT}", f"{key}.lora_down.weight", f"{key}.lora_up.weight", shape=(6, 768))
    fused(tmp_path / "o.safetensors", made.save(tmp_path / "a.safetensors"), format="kohya")
    assert {name.partition(".")[0] for name in TensorFile.open(tmp_path / "o.safetensors").entries} == {key}


def test_a_long_lineage_keeps_names_hashes_and_weights(tmp_path: Path) -> None:
    training = json.dumps({"base": "tiny", "base_kind": "tiny", "words": "x" * 15_000})
    rewarded = json.dumps({"rewards": ["brightness:2"], "words": "x" * 15_000})
    one = simple(tmp_path / "a.safetensors", texforce=training)
    two = simple(tmp_path / "b.safetensors", seed=1, texforce=rewarded)
    fused(tmp_path / "c.safetensors", f"{one}:{1 / 3!r}", two)
    fused(tmp_path / "d.safetensors", tmp_path / "c.safetensors")
    about = json.loads(read_lora(str(tmp_path / "d.safetensors")).metadata["texforce.fuse"])["sources"][0]
    sources = about["fused from"]["sources"]
    assert [(source["name"], float(source["weight"])) for source in sources] == [("a", 1 / 3), ("b", 1.0)]
    assert all(len(source["sha256"][0]) == 64 for source in sources)
    assert [source.get("trained") for source in sources] == [None, {"rewards": ["brightness"]}]
    assert trained_on(str(tmp_path / "d.safetensors")) == {"brightness"}


def test_half_a_surrogate_in_a_header_is_no_traceback(tmp_path: Path) -> None:
    path = simple(tmp_path / "a.safetensors", ss_sd_model_name="model")
    data = path.read_bytes().replace(b'"model"', b'"\\udc"')  # of the same length, and no JSON
    path.write_bytes(data)
    with pytest.raises(TexforceError):
        plan_fuse(FuseRequest([str(path)], out=tmp_path / "o.safetensors"))
    path = simple(tmp_path / "b.safetensors", ss_sd_model_name="modelx")
    path.write_bytes(path.read_bytes().replace(b'"modelx"', b'"\\ud800"'))
    fused(tmp_path / "o.safetensors", path)
    assert read_lora(str(tmp_path / "o.safetensors")).metadata["ss_sd_model_name"] == "?"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "there is nothing to fuse"),
        (["none.safetensors"], 2, "there is no LoRA 'none.safetensors'"),
        (["a.safetensors", "--method", "cat", "--rank", "4"], 2, "belong to --method svd"),
        (["a.safetensors", "--max-error", "0.1", "--rank", "4"], 2, "exclude each other"),
        (["a.safetensors", "--out", "a.safetensors", "--force"], 2, "is one of the sources"),
        (["a.safetensors", "--out", "same.safetensors", "--force"], 2, "is one of the sources"),
        (["a.safetensors", "--out", "hard.safetensors", "--force"], 2, "is one of the sources"),
        (["a.safetensors", "--out", "peft/../a.safetensors", "--force"], 2, "is one of the sources"),
        (["a.safetensors", "--out", "."], 2, "'.' is no name for what is written"),
        (["a.safetensors", "--max-error", "nan"], 2, "'nan' is no number from 0 to 1"),
        (
            "--extract full.safetensors tuned.safetensors --rank 2 --out x.safetensors --max-rest nan".split(),
            2,
            "'nan' is no number from 0 to 1",
        ),
        (["a.safetensors", "--out", "x.bin"], 2, "does not end in .safetensors"),
        (["a.safetensors", "--out", "folder.safetensors", "--force"], 2, "is a folder"),
        (
            ["a.safetensors", "--format", "peft", "--out", "folder.safetensors", "--force"],
            2,
            "holds 'precious', which is no part",
        ),
        (["peft", "--format", "peft", "--out", ".", "--force"], 2, "is one of the sources"),
        (["a.safetensors", "--out", "x" * 300 + ".safetensors"], 2, "cannot be looked at|could not be written"),
        (["nan.safetensors", "--out", "new/folder/x.safetensors"], 1, "holds NaN or infinite values in"),
        (
            [
                "--extract",
                "full.safetensors",
                "tuned.safetensors",
                "--rank",
                "2",
                "--out",
                "tuned.safetensors",
                "--force",
            ],
            2,
            "is one of the sources",
        ),
        (["peft", "--format", "peft", "--out", "peft", "--force"], 2, "is one of the sources"),
        (["nan.safetensors", "--out", "other.safetensors", "--force"], 1, "holds NaN or infinite values in"),
        (["nan.safetensors", "--format", "peft", "--out", "old", "--force"], 1, "holds NaN or infinite values in"),
        (["a.safetensors", "other.safetensors"], 1, "different base models"),
        (["nan.safetensors"], 1, "holds NaN or infinite values in"),
        (["a.safetensors:0.5", "cut.safetensors"], 1, "'cut.safetensors' is cut short"),
        (["a.safetensors:x=1,y"], 2, "there is no LoRA"),
        (["folder.safetensors"], 2, "holds no LoRA"),
        (["deep.bin"], 2, "is a pickle"),
        (["deep.bin", "--allow-pickle"], 1, "'deep.bin' (cannot be read as tensors alone|holds no table of tensors)"),
        (["hostile.bin", "--allow-pickle"], 1, "'hostile.bin' cannot be read as tensors alone"),
        (["loop.safetensors"], 2, "there is no LoRA 'loop.safetensors'"),
        (["--inspect"], 2, "there is nothing to inspect"),
        (["--extract", "a", "b"], 2, "needs --rank and --out"),
        (["a.safetensors", "--out", "/proc/none/x.safetensors"], 1, "cannot be written|could not be written"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], code: int, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    simple(Path("a.safetensors"))
    simple(Path("other.safetensors"), shape=(7, 5))
    peft_folder(Path("peft"))
    peft_folder(Path("old"))
    Path("same.safetensors").symlink_to("a.safetensors")
    os.link("a.safetensors", "hard.safetensors")
    Path("folder.safetensors").mkdir()
    Path("folder.safetensors/precious").write_text("x")
    Path("deep.bin").write_bytes(b"\x80\x02.")
    Path("hostile.bin").write_bytes(b"cos\nmkdir\n(S'owned'\ntR.")
    Path("loop.safetensors").symlink_to("loop.safetensors")
    Path("cut.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:-5])
    for name in ("full", "tuned"):
        safetensors.numpy.save_file({"conv_in.weight": np.ones((2, 2, 3, 3), np.float32)}, f"{name}.safetensors")
    broken = Made().add(f"unet.{UNET}.to_q", *(f"unet.{UNET}.to_q.lora_{x}.weight" for x in "AB"))
    broken.tensors[f"unet.{UNET}.to_q.lora_B.weight"][1, 1] = np.inf
    broken.save(Path("nan.safetensors"))
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert app.run(["fuse", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert __import__("re").search(sentence, captured.err), captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_a_name_that_is_no_utf8_and_one_with_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9\x1b[31m.safetensors")
    simple(Path("a.safetensors")).rename(name)
    assert app.run(["fuse", f"{name}:0.5"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert app.run(["fuse", name, "--inspect", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["format"] == "diffusers"


def test_a_long_list_of_sources_gets_a_short_name(tmp_path: Path) -> None:
    paths = [simple(tmp_path / f"{'long' * 10}{i}.safetensors") for i in range(6)]
    name = plan_fuse(FuseRequest([str(path) for path in paths])).out.name
    assert name.startswith("6-loras-")
    assert len(name) < 50
    run = tmp_path / "my run" / "adapter"
    simple(run / "pytorch_lora_weights.safetensors")
    assert plan_fuse(FuseRequest([f"{run}:te=0.5,unet=-1"])).out.name == "my_run-te0.5-unet-1.safetensors"


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        (["a.safetensors:1e-3", "b.safetensors:-0.5"], "a-0.001+b--0.5"),
        (["a.safetensors:1e-9"], "a-1e-09"),
        (["x/a.safetensors:.7", "y/a.safetensors:+0.3"], "a-0.7+a-0.3"),
        (["linked.safetensors"], "linked-1"),
        (["a (1) #é:?.safetensors:te=-1,te2=0,unet=1e-6"], "a__1___é__-te-1-te20-unet1e-06"),
        (["run/adapter", "run/checkpoints/../adapter:0.5"], "run-1+run-0.5"),
        (["run/checkpoints/epoch_0010"], "run-epoch_0010-1"),
        (["run/checkpoints/epoch_0010/pytorch_lora_weights.safetensors:2"], "run-epoch_0010-2"),
        (["peft/unet"], "peft-1"),
    ],
)
def test_the_name_of_what_is_made_comes_from_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("a", "b", "x/a", "y/a", "a (1) #é:?"):
        simple(Path(f"{file}.safetensors"))
    for folder in ("run/adapter", "run/checkpoints/epoch_0010", "peft/unet"):
        simple(Path(folder, "pytorch_lora_weights.safetensors"))
    Path("linked.safetensors").symlink_to("a.safetensors")
    plan = plan_fuse(FuseRequest(sources))
    assert plan.out.name == f"{name}.safetensors"
    assert plan_fuse(FuseRequest(sources, format="peft")).out.name == name
    fuse(plan)
    with pytest.raises(UsageError, match="exists already"):
        plan_fuse(FuseRequest(sources))


@pytest.mark.skipif(os.name != "posix", reason="no limit on the size of files")
@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_a_disk_that_takes_no_more_in_mid_file_leaves_nothing(tmp_path: Path, capsys: Any, form: str) -> None:
    import resource

    source = simple(tmp_path / "a.safetensors", rank=32, shape=(500, 500))
    out = tmp_path / "new" / ("out" if form == "peft" else "out.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert app.run(["fuse", f"{source}:te=0", "--format", form, "--out", str(out)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert f"'{out}' could not be written" in said.err
    assert list(tmp_path.iterdir()) == [source]


def test_dry_run_inspect_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = simple(Path("a.safetensors")), kohya(Path("x"))[0]
    assert app.run(["fuse", str(one), f"{two}:te2=3", "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["texforce"] == 1
    assert (document["plan"]["modules"], document["plan"]["highest_rank"]) == (7, 8)
    assert document["plan"]["sources"][1] == {
        "source": str(two),
        "weight": "te2=3",
        "format": "kohya",
        "components": ["text_encoder", "unet"],
    }
    assert "has no component for te2" in document["warnings"][0]
    assert app.run(["fuse", str(one), str(two), "--dry-run"]) == 0
    assert "7 modules, rank at most 8, cat" in capsys.readouterr().out
    made = ["fuse", f"{one}:0.5", "--rank", "1", "--json", "--out"]
    assert app.run([*made, "o.safetensors"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert (result["out"], result["modules"], result["ranks"]) == ("o.safetensors", 2, [1, 1])
    assert result["bytes"] == Path("o.safetensors").stat().st_size
    assert 0 < result["truncation_error"] <= result["worst"][1] < 1
    assert app.run([*made, "o.safetensors"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2
    Path("o.safetensors").unlink()
    assert app.run(["fuse", "--inspect", str(two)]) == 0
    shown = capsys.readouterr().out
    assert "kohya, a model of text width 5" in shown
    assert "text_encoder: 1 modules (0 convolutions), rank 4, alpha 1, F32" in shown
    assert "unet: 5 modules (1 convolutions), rank 4 (3), 8 (1), 2 (1), alpha 2 (3), 16 (1), 4 (1), F32" in shown
    norm = np.sqrt(sum(np.sum(d**2) for name, d in deltas(two).items() if name.startswith("unet")))
    assert f"norm {norm:.4g}" in shown
    assert app.run(["fuse", "--inspect", "--json", f"{two}:0.5"]) == 0
    about = json.loads(capsys.readouterr().out)["files"][0]
    assert about["sha256"] == [hashlib.sha256(two.read_bytes()).hexdigest()]
    assert about["components"]["unet"]["alphas"] == {"2": 3, "16": 1, "4": 1}
    assert about["components"]["unet"]["norm"] == pytest.approx(norm, rel=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "x"]


def test_fuse_imports_neither_torch_nor_what_draws_bars_where_there_is_no_terminal(tmp_path: Path) -> None:
    path = simple(tmp_path / "a.safetensors")
    full = [tmp_path / f"full{value}.safetensors" for value in range(2)]
    for value, file in enumerate(full):
        safetensors.numpy.save_file({"conv_in.weight": np.full((2, 2, 3, 3), value, np.float32)}, file)
    code = (
        "import sys; from texforce_cli.cli.app import run; "
        f"assert run(['fuse', {str(path)!r}, '--rank', '2', '--dtype', 'bf16', '--out', {str(tmp_path / 'o.safetensors')!r}]) == 0; "
        f"assert run(['fuse', '--inspect', {str(path)!r}]) == 0; "
        f"assert run(['fuse', '--extract', {str(full[0])!r}, {str(full[1])!r}, '--rank', '1', '--out', {str(tmp_path / 'e.safetensors')!r}]) == 0; "
        "print([m for m in ('torch', 'diffusers', 'transformers', 'peft', 'scipy', 'rich.progress') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_bars_are_drawn_on_a_terminal_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    source, out = simple(tmp_path / "a.safetensors"), tmp_path / "o.safetensors"
    for terminal in (True, False):
        monkeypatch.setattr(console.stderr(), "_force_terminal", terminal)
        monkeypatch.setattr(console, "plain", lambda stream, terminal=terminal: not terminal)
        assert app.run(["fuse", str(source), "--out", str(out), "--force"]) == 0
        said = capsys.readouterr()
        assert ("\x1b[?25l" in said.err) is terminal  # the cursor is hidden while bars are drawn
        assert said.out == f"{out}\n"


def test_the_peft_folders_that_are_written_load_in_peft(tmp_path: Path, pipeline: Any) -> None:
    """Their effect on the text encoder and the U-Net of the embedded model is the one that they encode."""
    made = Made()
    layer = "text_model.encoder.layers.0.self_attn"
    width = pipeline.text_encoder.config.hidden_size
    for name, rank in (("q_proj", 4), ("out_proj", 2)):
        made.add(
            f"text_encoder.{layer}.{name}",
            *(f"text_encoder.{layer}.{name}.lora_{x}.weight" for x in "AB"),
            rank=rank,
            shape=(width, width),
        )
    source = made.save(tmp_path / "a.safetensors")
    fused(tmp_path / "peft", source, format="peft")
    encoder = pipeline.text_encoder
    own = {name: parameter.detach().clone().double().numpy() for name, parameter in encoder.named_parameters()}
    merged = PeftModel.from_pretrained(encoder, tmp_path / "peft").merge_and_unload()
    for name, parameter in merged.named_parameters():
        delta = made.wanted.get(
            f"text_encoder.text_model.{name.removeprefix('text_model.').removesuffix('.weight')}", 0.0
        )
        assert np.allclose(parameter.detach().double().numpy(), own[name] + delta, rtol=0, atol=1e-5), name


def test_what_is_written_loads_in_diffusers_with_the_exact_effect(tmp_path: Path, pipeline: Any) -> None:
    made = Made()
    width = pipeline.text_encoder.config.hidden_size
    for name in ("q_proj", "out_proj"):  # diffusers tells kohya's text encoders by their out_proj
        text = f"text_model.encoder.layers.0.self_attn.{name}"
        made.add(
            f"text_encoder.{text}",
            *(f"base_model.model.{text}.lora_{x}.weight" for x in "AB"),
            rank=3,
            shape=(width, width),
        )
    unet = [
        name for name, module in pipeline.unet.named_modules() if name.endswith(("attn2.to_k", "conv1", "to_out.0"))
    ][:6]
    for index, name in enumerate(unet):
        weight = pipeline.unet.get_submodule(name).weight
        kernel = tuple(weight.shape[2:])
        made.add(
            f"unet.{name}",
            *(f"unet.{name}.lora_{x}.weight" for x in "AB"),
            rank=2 + index,
            shape=tuple(weight.shape[:2]),
            kernel=kernel,
        )
    source = made.save(tmp_path / "a.safetensors")
    for form in ("diffusers", "kohya"):
        fused(tmp_path / f"{form}.safetensors", f"{source}:0.5", format=form)
        plain = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None, dtype=torch.float32)
        before = {
            f"{c}.{n}": p.detach().clone()
            for c in ("unet", "text_encoder")
            for n, p in getattr(plain, c).named_parameters()
        }
        plain.load_lora_weights(tmp_path, weight_name=f"{form}.safetensors")
        plain.fuse_lora()
        plain.unload_lora_weights()
        for component in ("unet", "text_encoder"):
            for name, parameter in getattr(plain, component).named_parameters():
                key = f"{component}.{'text_model.' if component == 'text_encoder' and not name.startswith('text_model') else ''}{name.removesuffix('.weight')}"
                delta = 0.5 * made.wanted[key].reshape(parameter.shape) if key in made.wanted else 0.0
                expected = before[f"{component}.{name}"].double().numpy() + delta
                assert np.allclose(parameter.detach().double().numpy(), expected, rtol=0, atol=3e-5), (form, key)


@pytest.mark.parametrize("names", [("mlp.fc1",), ("mlp.fc2", "self_attn.k_proj")])
def test_a_text_encoder_of_any_layers_loads_in_diffusers_with_the_exact_effect(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    """diffusers knows one without attention layers by its older names alone."""
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None, dtype=torch.float32)
    made, layers = Made(), {}
    for name in names:
        found = next(n for n, _ in pipeline.text_encoder.named_modules() if n.endswith(f"layers.1.{name}"))
        layers[f"text_encoder.text_model.{found.removeprefix('text_model.')}"] = found
    for key, found in layers.items():
        shape = tuple(pipeline.text_encoder.get_submodule(found).weight.shape)
        made.add(key, *(f"{key}.lora_{x}.weight" for x in "AB"), shape=shape)
    before = {key: pipeline.text_encoder.get_submodule(found).weight.detach().clone() for key, found in layers.items()}
    assert close(fused(tmp_path / "b.safetensors", made.save(tmp_path / "a.safetensors")), made.wanted)
    pipeline.load_lora_weights(tmp_path, weight_name="b.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for key, found in layers.items():
        change = (pipeline.text_encoder.get_submodule(found).weight - before[key]).detach().double().numpy()
        assert np.allclose(change, made.wanted[key], rtol=0, atol=3e-5), key


def test_a_text_encoder_that_diffusers_does_not_load_in_kohyas_form_is_told(tmp_path: Path) -> None:
    """One of q_proj and v_proj, as in peft's examples: its attention is known to diffusers by an out_proj."""
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None, dtype=torch.float32)
    width = pipeline.text_encoder.config.hidden_size
    made = Made()
    for name in ("q_proj", "v_proj"):
        key = f"text_model.encoder.layers.0.self_attn.{name}"
        keys = [f"base_model.model.{key}.lora_{x}.weight" for x in "AB"]
        made.add(f"text_encoder.{key}", *keys, shape=(width, width))
    source = str(made.save(tmp_path / "a.safetensors"))
    for form, warned in (("diffusers", False), ("peft", False), ("kohya", True)):
        plan = plan_fuse(FuseRequest([source], out=tmp_path / f"{form}.safetensors", format=form))  # type: ignore[arg-type]
        assert any("the attention of text_encoder in kohya's form" in text for text in plan.warnings) is warned
    fuse(plan)
    with pytest.raises(ValueError, match="infer state dict type"):
        pipeline.load_lora_weights(tmp_path, weight_name="kohya.safetensors")


@pytest.mark.parametrize(("others", "warned"), [((4, 4, 2), False), ((4, 2, 2), True), ((), True)])
def test_a_text_projection_that_diffusers_does_not_load_in_kohyas_form_is_told(
    tmp_path: Path, others: tuple[int, ...], warned: bool
) -> None:
    """It takes the rank that most of the layers have which it counts; alone nothing is counted."""
    made = Made()
    made.add("p", *(f"text_encoder_2.text_projection.lora_{x}.weight" for x in "AB"), rank=4)
    for rank, name in zip(others, ("q_proj", "v_proj", "out_proj")):
        key = f"text_encoder_2.text_model.encoder.layers.0.self_attn.{name}"
        made.add(key, *(f"{key}.lora_{x}.weight" for x in "AB"), rank=rank)
    source = str(made.save(tmp_path / "a.safetensors"))
    plan = plan_fuse(FuseRequest([source], out=tmp_path / "b.safetensors", format="kohya"))
    assert any("text_encoder_2.text_projection in kohya's form only" in text for text in plan.warnings) is warned


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """An SDXL of its real text widths, one layer in each encoder, two narrow blocks in the U-Net; random, in float64."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48, "vocab_size": 50}
    first = CLIPTextModel(CLIPTextConfig(hidden_size=768, **heads))
    second = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=1280, projection_dim=32, **heads))
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=2,  # by which diffusers counts in kohya's names
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    parts = {"text_encoder": first.eval(), "text_encoder_2": second.eval(), "unet": unet.eval()}
    scheduler = EulerDiscreteScheduler()
    pipeline = StableDiffusionXLPipeline(vae=None, tokenizer=None, tokenizer_2=None, scheduler=scheduler, **parts)
    return pipeline.to(torch.float64)


def outputs(parts: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """What each part of that SDXL makes of the same input."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4, 8, 8, generator=generator).double()
    text = torch.randn(1, 5, 2048, generator=generator).double()
    added = {"text_embeds": torch.ones(1, 32).double(), "time_ids": torch.ones(1, 6).double()}
    with torch.no_grad():
        found = {name: parts[name](torch.arange(9)[None])[0] for name in ("text_encoder", "text_encoder_2")}
        return {**found, "unet": parts["unet"](noise, 3, text, added_cond_kwargs=added).sample}


def level(component: str, name: str) -> str:
    """The name of a live layer as files have it."""
    inside = component != "unet" and name != "text_projection"
    return f"text_model.{name.removeprefix('text_model.')}" if inside else name


@pytest.mark.parametrize(("form", "ranks"), [("diffusers", 1), ("diffusers", 5), ("kohya", 1), ("peft", 5)])
def test_both_encoders_and_the_unet_of_sdxl_load_with_the_exact_effect(tmp_path: Path, form: Any, ranks: int) -> None:
    pipeline, made, base = tiny_sdxl(), Made(), tiny_sdxl()
    parts = {name: getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2", "unet")}
    for component, part in parts.items():
        for name, layer in part.named_modules():
            if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                continue
            path = level(component, name)
            shape, kernel = layer.weight.shape[:2], tuple(layer.weight.shape[2:])
            keys = [f"{component}.{path}.lora_{x}.weight" for x in "AB"]
            rank = 2 + len(made.wanted) % ranks
            made.add(f"{component}.{path}", *keys, rank=rank, shape=tuple(shape), kernel=kernel)
    made.tensors = {key: 0.03 * value for key, value in made.tensors.items()}
    source = made.save(tmp_path / "a.safetensors")
    out = tmp_path / ("out" if form == "peft" else "out.safetensors")
    fused(out, f"{source}:te=0.5,te2=-2", format=form)  # and the U-Net at 1
    before = outputs(parts)
    weights = {"text_encoder": 0.5, "text_encoder_2": -2.0, "unet": 1.0}
    for component in parts:
        for name, layer in getattr(base, component).named_modules():
            path = level(component, name)
            if f"{component}.{path}" in made.wanted:
                delta = weights[component] * 0.03**2 * made.wanted[f"{component}.{path}"]
                layer.weight.data += torch.from_numpy(delta).reshape(layer.weight.shape)
    wanted = outputs({component: getattr(base, component) for component in parts})
    if form == "peft":
        parts = {name: PeftModel.from_pretrained(part, out / name).eval() for name, part in parts.items()}
    else:
        pipeline.load_lora_weights(tmp_path, weight_name=out.name)
    found = outputs(parts)
    for component in parts:
        assert (wanted[component] - before[component]).abs().max() > 1e-2, component
        assert (found[component] - wanted[component]).abs().max() <= 1e-6, component


def test_files_that_peft_and_diffusers_make_give_the_change_that_they_encode(tmp_path: Path, pipeline: Any) -> None:
    """Made by the libraries themselves: rank and alpha patterns, rslora, alpha = 2 r in diffusers' header."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    def filled(module: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)

    def changes(module: torch.nn.Module, component: str) -> dict[str, Any]:
        found = {}
        for name, layer in module.named_modules():
            if hasattr(layer, "get_delta_weight") and layer.lora_A:
                level = "text_model." if component == "text_encoder" and "text_model" not in name else ""
                path = name.removeprefix("base_model.model.")
                found[f"{component}.{level}{path}"] = (
                    layer.get_delta_weight(next(iter(layer.lora_A))).detach().double().numpy()
                )
        return found

    targets = ["q_proj", "out_proj", "fc1"]
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        rank_pattern={"out_proj": 9},
        alpha_pattern={"fc1": 3},
        use_rslora=True,
    )
    wrapped = get_peft_model(pipeline.text_encoder, config)
    filled(wrapped)
    wrapped.save_pretrained(tmp_path / "peft")
    wanted = changes(wrapped, "text_encoder")
    assert len(wanted) == 3 * pipeline.text_encoder.config.num_hidden_layers
    assert close(fused(tmp_path / "a.safetensors", tmp_path / "peft"), wanted)

    plain = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None, dtype=torch.float32)
    plain.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_k", "to_out.0", "conv1", "proj_in"]))
    plain.text_encoder.add_adapter(
        LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    )
    filled(plain.unet)
    filled(plain.text_encoder)
    wanted = changes(plain.unet, "unet") | changes(plain.text_encoder, "text_encoder")
    unet, text = (
        convert_state_dict_to_diffusers(get_peft_model_state_dict(m)) for m in (plain.unet, plain.text_encoder)
    )
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "diffusers", unet_lora_layers=unet, text_encoder_lora_layers=text,
        unet_lora_adapter_metadata={"r": 4, "lora_alpha": 8}, text_encoder_lora_adapter_metadata={"r": 3, "lora_alpha": 6},
    )  # fmt: skip
    assert close(fused(tmp_path / "b.safetensors", tmp_path / "diffusers"), wanted)

    plain.unet.save_lora_adapter(tmp_path / "unet")  # names no component, neither in its keys nor in its header
    alone = {name: delta for name, delta in wanted.items() if name.startswith("unet")}
    assert close(fused(tmp_path / "u.safetensors", tmp_path / "unet"), alone)
    assert not read_lora(str(tmp_path / "unet")).warnings

    keys = {f"unet.{key}": value for key, value in get_peft_model_state_dict(plain.unet).items()}
    safetensors.torch.save_file(convert_state_dict_to_kohya(keys), tmp_path / "kohya.safetensors")
    half = {name: delta / 2 for name, delta in alone.items()}  # the converter sets alpha = rank
    assert close(fused(tmp_path / "c.safetensors", tmp_path / "kohya.safetensors"), half)
