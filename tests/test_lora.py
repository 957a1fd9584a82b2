"""LoRA files: the syntax of a weight, every format read to the change that it encodes, refusals."""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_files import FORMATS, TEXT, UNET, Made, close, deltas, factors, kohya, peft_folder

from texforce_cli.cli import app
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.lora.lora import Lora, common_bases
from texforce_cli.lora.names import parse_key
from texforce_cli.lora.read import find_lora, read_lora
from texforce_cli.lora.spec import LoraSpec, parse_lora
from texforce_cli.lora.write import lora_bytes, new_lora

KEY = f"text_encoder.{TEXT}"
FC1, FC2 = (f"text_model.encoder.layers.1.mlp.{name}" for name in ("fc1", "fc2"))
DEEP = "down_blocks.2.attentions.0.transformer_blocks.9.attn1"


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.7", "a.safetensors", 0.7),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:-0.3", r"C:\loras\a.safetensors", -0.3),
        ("a:b.safetensors", "a:b.safetensors", 1.0),
        ("x:.5", "x", 0.5),
        ("org/repo:1e-1", "org/repo", 0.1),
        ("a:te", "a:te", 1.0),
    ],
)
def test_a_source_with_a_weight(text: str, source: str, weight: float) -> None:
    assert parse_lora(text) == LoraSpec(source, weight)


@pytest.mark.parametrize(
    "text",
    [
        "x:nan",
        "x:inf",
        "x:1e300",
        "x:0,7",
        "x:",
        ":0.5",
        "",
        "x:te=",
        "x:te=nan",
        "x:te=1_0",
        "x:te= 0.5",
        "x:te=0.7,te=0.3",
        "x:te=0.7,unet=inf",
        ":te=1",
    ],
)
def test_what_looks_like_a_weight_and_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no LoRA with a weight"):
        parse_lora(text)


@pytest.mark.skipif(sys.platform == "win32", reason="there these are no names of folders")
def test_a_path_that_ends_as_if_with_a_weight_is_whole_where_it_alone_exists(tmp_path: Path) -> None:
    for name in ("a+b=c:1", "nan:nan", "both", "both:2"):
        (tmp_path / name).mkdir()
    found = [parse_lora(f"{tmp_path}/{text}") for text in ("a+b=c:1", "a+b=c:1:0.5", "nan:nan", "both:2")]
    names = [(Path(spec.source).name, spec.weight) for spec in found]
    assert names == [("a+b=c:1", 1), ("a+b=c:1", 0.5), ("nan:nan", 1), ("both", 2)]


@given(st.text(min_size=1), st.floats(-1e6, 1e6))
def test_any_path_with_any_weight_is_read_back(path: str, weight: float) -> None:
    assert parse_lora(f"{path}:{weight!r}") == LoraSpec(path, weight)


@given(
    st.one_of(
        st.text(),
        st.from_regex(
            r"[a:C\\./]{0,4}:?([-+]?[0-9.,e]{0,6}|(te2?|unet)=[-0-9.e]{0,5}(,te=1)?|nan|inf)", fullmatch=True
        ),
    )
)
def test_any_text_is_a_source_with_a_weight_that_is_written_the_same_or_one_sentence(text: str) -> None:
    try:
        spec = parse_lora(text)
    except UsageError as error:
        assert "is no LoRA with a weight" in str(error)
        return
    assert text.startswith(spec.source)
    assert spec.source
    assert all(math.isfinite(weight) for weight in (spec.weight, *spec.parts.values()))
    assert parse_lora(str(spec)) == spec


@given(st.dictionaries(st.sampled_from(["te", "te2", "unet"]), st.floats(-10, 10), min_size=1))
def test_weights_of_components_are_read_back(parts: dict[str, float]) -> None:
    text = ",".join(f"{name}={value!r}" for name, value in parts.items())
    assert parse_lora(f"C:\\a.safetensors:{text}") == LoraSpec("C:\\a.safetensors", 1.0, parts)


def test_the_weight_of_each_component() -> None:
    spec = parse_lora("a:te=0.7,unet=0.3")
    assert [spec.weight_of(c) for c in ("text_encoder", "text_encoder_2", "unet")] == [0.7, 0.7, 0.3]
    spec = parse_lora("a:te2=0.2,te=0.7")
    assert [spec.weight_of(c) for c in ("text_encoder", "text_encoder_2", "unet")] == [0.7, 0.2, 1.0]
    assert parse_lora("a:0.4").weight_of("unet") == 0.4


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_change_that_it_encodes(name: str, tmp_path: Path) -> None:
    path, wanted = FORMATS[name](tmp_path / "x")
    lora = read_lora(str(path))
    assert lora.format.startswith(name.partition(",")[0])
    assert close(deltas(lora), wanted)


def test_names_of_kohya_and_of_the_original_code_are_told_apart(tmp_path: Path) -> None:
    assert "sgm" in read_lora(str(FORMATS["kohya, sgm names"](tmp_path / "x")[0])).format
    assert read_lora(str(kohya(tmp_path / "y")[0])).format == "kohya"


OTHERS = {  # names in use beside those of the whole files above
    "unet.mid_block.attentions.0.proj_in.lora_A.default.weight": "unet.mid_block.attentions.0.proj_in",
    "model.diffusion_model.middle_block.1.proj_in.lora_up.weight": "unet.mid_block.attentions.0.proj_in",
    "lora_unet_output_blocks_2_1_conv.lora_down.weight": "unet.up_blocks.0.upsamplers.0.conv",  # of SD 1.x: no attention
    "lora_unet_input_blocks_1_1_proj_in.alpha": "unet.down_blocks.0.attentions.0.proj_in",
    "lora_unet_output_blocks_11_1_proj_out.alpha": "unet.up_blocks.3.attentions.2.proj_out",
    "lora_te_text_model_encoder_layers_22_mlp_fc1.alpha": "text_encoder.text_model.encoder.layers.22.mlp.fc1",  # SD 2.x
    "lora_te2_text_model_encoder_layers_31_mlp_fc2.lora_up.weight": (
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc2"
    ),
    "lora_te_encoder_layers_1_self_attn_q_proj.alpha": KEY,  # of transformers >= 5.6, whose models have no text_model
    "lora_te1_encoder_layers_1_mlp_fc1.lora_down.weight": f"text_encoder.{FC1}",
    **{f"{KEY.replace('q_proj', f'to_{x}_lora')}.up.weight": KEY.replace("q_proj", f"{x}_proj") for x in "qkv"},
    f"unet.{UNET}.to_q_lora.down.weight": f"unet.{UNET}.to_q",
    **{f"unet.unet.{UNET}.{x}.down.weight": f"unet.{UNET}.to_v" for x in ("processor.to_v_lora", "to_v.lora")},
    "lora_te2_text_projection.lora_down.weight": "text_encoder_2.text_projection",
    f"text_encoders.clip_h.transformer.{TEXT}.lora_up.weight": f"text_encoder.{TEXT}",
    f"text_encoders.clip_g.transformer.{TEXT}.lora_up.weight": f"text_encoder_2.{TEXT}",
    f"clip_l.{TEXT}.lora_up.weight": f"text_encoder.{TEXT}",
    f"cond_stage_model.transformer.{TEXT}.lora_A.weight": f"text_encoder.{TEXT}",
    f"conditioner.embedders.0.transformer.{TEXT}.lora_A.weight": f"text_encoder.{TEXT}",
    f"text_encoder_2.base_model.model.{TEXT}.lora_A.weight": f"text_encoder_2.{TEXT}",
}


@pytest.mark.parametrize("key", OTHERS)
def test_a_layer_is_known_by_every_name_in_use(key: str) -> None:
    place = parse_key(key)
    assert place is not None
    assert place.module == OTHERS[key]
    assert not place.bare


@pytest.mark.parametrize("depth", [0, 1, 9])
def test_any_layer_of_a_unet_comes_back_from_its_name_in_kohyas_form(depth: int) -> None:
    for block in ("down_blocks.0.attentions.1", "up_blocks.3.attentions.2", "mid_block.attentions.0"):
        for inside in ("attn1.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"):
            path = f"{block}.transformer_blocks.{depth}.{inside}"
            place = parse_key(f"lora_unet_{path.replace('.', '_')}.lora_down.weight")
            assert place is not None
            assert place.path == path


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("unet.down_blocks.{}.attentions.0.proj_in", 3),
        ("unet.down_blocks.0.attentions.{}.proj_in", 2),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.{}.attn1.to_q", 9),
        ("text_encoder.text_model.encoder.layers.{}.mlp.fc1", 31),
    ],
)
def test_a_layer_that_no_model_has_is_of_no_lora(path: str, last: int) -> None:
    assert parse_key(f"{path.format(last)}.lora_A.weight") is not None
    assert parse_key(f"{path.format(last + 1)}.lora_A.weight") is None


def test_a_kernel_on_a_layer_that_is_no_convolution_is_refused(tmp_path: Path) -> None:
    key = f"unet.{UNET}.to_k"
    path = (
        Made().add(key, f"{key}.lora_A.weight", f"{key}.lora_B.weight", kernel=(3, 3)).save(tmp_path / "a.safetensors")
    )
    with pytest.raises(TexforceError, match=r"to_k.* of shape \[4, 5, 3, 3\], which is of a convolution"):
        read_lora(str(path))


def test_a_pickle_is_refused_unless_allowed_and_then_only_tensors_are_made(tmp_path: Path) -> None:
    folder, wanted = peft_folder(tmp_path / "x")
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(UsageError, match="is a pickle, which can run code"):
        read_lora(str(folder))
    assert close(deltas(read_lora(str(folder), allow_pickle=True)), wanted)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"version https://git-lfs.github.com/spec/v1\nsize 3\n", "git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"", "is empty"),
    ],
)
def test_what_stands_in_the_place_of_a_pickle_is_told(tmp_path: Path, content: bytes, sentence: str) -> None:
    folder, _ = peft_folder(tmp_path / "x")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(content)
    with pytest.raises(TexforceError, match=rf"adapter_model.bin' .*{sentence}"):
        read_lora(str(folder), allow_pickle=True)


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (open, (str(self.path), "w"))


def test_a_malicious_pickle_makes_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "a.bin").write_bytes(pickle.dumps({"x.lora_A.weight": _Hostile(trace)}))
    torch.save({"x.lora_A.weight": _Hostile(trace)}, tmp_path / "b.bin")
    trace.unlink(missing_ok=True)
    for name, reason in (("a.bin", "Unsupported operand 149"), ("b.bin", "Unsupported global: GLOBAL _?io.open")):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with pytest.raises(TexforceError, match=rf"cannot be read as tensors alone \({reason}"):
                read_lora(str(tmp_path / name), allow_pickle=True)
        assert not warned
    assert not trace.exists()


def test_a_lora_is_found_in_its_run_adapter_checkpoint_and_hub_folder(tmp_path: Path) -> None:
    file = tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(lora_bytes(Made().add(KEY, f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight").tensors, {}))
    for path in (file, file.parent, tmp_path / "run"):
        assert find_lora(str(path)) == [file]
    with pytest.raises(UsageError, match="holds no LoRA"):
        find_lora(str(tmp_path))
    with pytest.raises(UsageError, match="there is no LoRA"):
        find_lora(str(tmp_path / "none"))
    (tmp_path / "style.safetensors").write_bytes(file.read_bytes())
    (tmp_path / "._style.safetensors").write_bytes(b"\x00\x05\x16\x07")  # what macOS leaves on the disks of others
    assert find_lora(str(tmp_path)) == [tmp_path / "style.safetensors"]
    (tmp_path / "other.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match=r"holds several files \(other.safetensors, style.safetensors\)"):
        find_lora(str(tmp_path))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match="there is no LoRA"):
        find_lora(str(tmp_path / "loop"))


ONE = torch.ones(2, 2)
PAIR = {f"{KEY}.lora_A.weight": ONE, f"{KEY}.lora_B.weight": ONE}
STEM = "lora_unet_mid_block_attentions_0_proj_in"
REFUSED: list[tuple[dict[str, torch.Tensor], str]] = [
    ({}, "holds no tensors"),
    ({f"{KEY}.lora_A.weight": ONE}, "without its lora_B"),
    ({f"{KEY}.lora_B.weight": ONE}, "without its lora_A"),
    ({f"{STEM}.alpha": torch.tensor(1.0)}, "without its lora_A .down. and lora_B"),
    ({"model.diffusion_model.input_blocks.0.0.weight": ONE}, "is no LoRA .key 'model.diffusion.*--unet"),
    ({"text_model.encoder.layers.0.self_attn.q_proj.weight": ONE}, "is no LoRA"),
    ({**PAIR, "transformer.blocks.0.attn.lora_A.weight": ONE}, "is of no LoRA of SD 1.x.*are read, whole"),
    ({**PAIR, "something": ONE}, "holds 'something', which"),
    ({**PAIR, f"text_encoder.{TEXT}.lora_linear_layer.down.weight": ONE}, "which are the same"),
    ({f"{STEM}.hada_w1_a": ONE}, "is a LoHa"),
    ({f"{STEM}.lokr_w1": ONE}, "is a LoKr"),
    ({f"{STEM}.lora_mid.weight": ONE}, "Tucker"),
    ({f"{STEM}.dora_scale": ONE}, "is a DoRA"),
    ({f"{KEY}.lora_magnitude_vector": ONE}, "is a DoRA"),
    ({f"{KEY}.lora_B.bias": ONE}, "with a bias"),
    ({f"{STEM}.diff": ONE}, "full differences"),
    ({f"{STEM}.diff_b": ONE}, "full differences"),
    ({f"{STEM}.w_norm": ONE}, "changed norms"),
    ({f"{STEM}.b_norm": ONE}, "changed norms"),
    ({f"{STEM}.oft_blocks": ONE}, "is an OFT"),
    ({f"{STEM}.a1.weight": ONE}, "is a GLoRA"),
    ({f"{STEM}.on_input": ONE}, "is an IA3"),
    ({f"{STEM}.lora_embedding_A": ONE}, "of an embedding"),
    ({"emb_params": ONE}, "is a textual inversion"),
    ({"<cat-toy>": ONE}, "is a textual inversion"),  # as diffusers writes it
    ({"clip_g": ONE, "clip_l": ONE}, "is a textual inversion"),  # of SDXL
    ({"a-token": ONE}, "is no LoRA .key 'a-token'.*SDXL are read"),  # an inversion in diffusers' form, of another name
    ({"unet:0:up": ONE, "unet:0:down": ONE}, "have numbers for names"),
    ({"conv_in.weight": ONE, "controlnet_mid_block.weight": ONE}, "is a ControlNet"),
    ({"bundle_emb.x.string_to_param.*": ONE, **PAIR}, "with textual inversions in it"),
    ({"lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": ONE}, "of no LoRA of SD 1.x"),
    (
        {
            "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q_lora.down.weight": ONE
        },
        "of no LoRA of SD 1.x",
    ),
    ({f"{KEY}.lora_A.weight": torch.ones(2, 3), f"{KEY}.lora_B.weight": torch.ones(3, 4)}, "cannot be multiplied"),
    ({f"{KEY}.lora_A.weight": torch.ones(0, 3), f"{KEY}.lora_B.weight": torch.ones(3, 0)}, "cannot be multiplied"),
    ({f"{KEY}.lora_A.weight": torch.ones(2), f"{KEY}.lora_B.weight": torch.ones(2)}, "cannot be multiplied"),
    (
        {f"{KEY}.lora_A.weight": torch.ones(2, 3), f"{KEY}.lora_B.weight": torch.ones(3, 2, 3, 3)},
        "cannot be multiplied",
    ),
    ({f"{STEM}.lora_down.weight": ONE, f"{STEM}.lora_up.weight": ONE, f"{STEM}.alpha": ONE}, "alpha is one number"),
    ({f"{STEM}.lora_down.weight": ONE, f"{STEM}.lora_up.weight": ONE, f"{STEM}.alpha": torch.tensor(math.nan)}, "NaN"),
    ({"lora_unet_nowhere_3.lora_down.weight": ONE, "lora_unet_nowhere_3.lora_up.weight": ONE}, "of no LoRA of SD 1.x"),
    ({"lora_unet_input_blocks_1_0_nothing.lora_down.weight": ONE}, "of no LoRA of SD 1.x"),
]


@pytest.mark.parametrize(("tensors", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_what_cannot_be_merged_is_refused_with_file_and_key(
    tmp_path: Path, capsys: Any, tensors: dict[str, torch.Tensor], sentence: str
) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({key: value.clone() for key, value in tensors.items()}, path)
    with pytest.raises(TexforceError, match=sentence):
        read_lora(str(path))
    assert app.run(["fuse", str(path), "--out", str(tmp_path / "new" / "b.safetensors")]) in (1, 2)
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "a.safetensors" in said.err
    assert not tensors or any(key[:117] in said.err for key in tensors)
    assert ("no sum of LoRAs can hold" in said.err) == ("merge it into a model there and use --extract" in said.err)
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_with_a_line_break_is_quoted_on_one_line(tmp_path: Path, capsys: Any) -> None:
    safetensors.torch.save_file({"a.lora_A\nerror: all is well\x1b[2J": ONE.clone()}, tmp_path / "a.safetensors")
    assert app.run(["fuse", str(tmp_path / "a.safetensors"), "--dry-run"]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert r"a.lora_A\nerror: all is well\x1b" in said


@pytest.mark.timeout(20)
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="holds no LoRA"):
        read_lora(str(tmp_path))
    path, wanted = kohya(tmp_path / "x")
    path.rename(tmp_path / "y.safetensors")
    assert close(deltas(tmp_path), wanted)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"peft_type": "LOHA"}, "of the type LOHA.*--extract"),
        ({"use_dora": True}, "made with use_dora.*--extract"),
        ({"bias": "all"}, "made with bias"),
        ({"modules_to_save": ["x"]}, "made with modules_to_save"),
        *(
            ({"init_lora_weights": how}, f"init_lora_weights '{how}', which changed the base weights")
            for how in ("pissa", "pissa_niter_16", "corda", "olora", "lora_ga", "loftq")
        ),
        ({"use_qalora": True}, "made with use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "made with use_bdlora"),
        ({"kasa_config": {"beta": 1}}, "made with kasa_config"),
        ({"alora_invocation_tokens": [1, 2]}, "made with alora_invocation_tokens"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "made with layer_replication"),
        ({"lora_alpha": "much"}, "an alpha of 'much'"),
        ({"lora_alpha": 1e999}, "an alpha of"),
        ({"lora_alpha": 10**400}, "an alpha of"),
        ({"lora_alpha": 4, "alpha_pattern": {"(a+)+$": 1}}, "only names of modules"),
    ],
)
def test_a_config_that_means_something_else_is_refused(tmp_path: Path, config: dict[str, Any], sentence: str) -> None:
    folder, _ = peft_folder(tmp_path / "x")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(TexforceError, match=sentence):
        read_lora(str(folder))


def test_ways_to_begin_that_leave_the_base_alone_are_read(tmp_path: Path) -> None:
    folder, wanted = peft_folder(tmp_path / "x")
    for how in (True, False, None, "gaussian", "eva", "orthogonal"):
        config = {"lora_alpha": 16, "init_lora_weights": how, "use_qalora": False, "layer_replication": None}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        assert close(deltas(folder), wanted)


@pytest.mark.parametrize("prefix", ["text_encoder.", ""])
def test_a_header_that_tells_of_changed_base_weights_is_refused(tmp_path: Path, prefix: str) -> None:
    header = json.dumps({f"{prefix}lora_alpha": 4, f"{prefix}init_lora_weights": "olora"})
    made = Made(metadata={"lora_adapter_metadata": header}).add(KEY, *(f"{KEY}.lora_{x}.weight" for x in "AB"))
    with pytest.raises(TexforceError, match="init_lora_weights 'olora'"):
        read_lora(str(made.save(tmp_path / "a.safetensors")))


def parts(folder: Path, **keys: str) -> Path:
    """A PEFT folder of folders, one layer in each."""
    for component, key in keys.items():
        made = Made().add(key, *(f"{key}.lora_{x}.weight" for x in "AB"))
        made.save(folder / component / "adapter_model.safetensors")
        (folder / component / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4}')
    return folder


def test_parts_that_hold_the_same_layer_or_another_parts_are_refused(tmp_path: Path) -> None:
    folder = parts(tmp_path / "a", text_encoder=f"base_model.model.{TEXT}", unet=f"base_model.model.{TEXT}")
    with pytest.raises(TexforceError, match=r"unet.*q_proj.*', which is of text_encoder, in a folder of unet"):
        read_lora(str(folder))
    folder = parts(tmp_path / "b", text_encoder=f"base_model.model.{UNET}.to_q")
    with pytest.raises(TexforceError, match=r"which is of unet, in a folder of text_encoder"):
        read_lora(str(folder))
    folder = parts(tmp_path / "c", text_encoder=KEY, unet=KEY)
    with pytest.raises(TexforceError, match=rf"unet/.*' holds '{KEY}.*', which '.*text_encoder/.*' holds as well"):
        read_lora(str(folder))


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "{" * 5000])
def test_a_config_that_cannot_be_read_is_one_sentence(tmp_path: Path, text: str) -> None:
    folder, _ = peft_folder(tmp_path / "x")
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(TexforceError, match=r"adapter_config.json' cannot be read"):
        read_lora(str(folder))


def attention(
    width: int, path: str = f"{UNET}.to_k", component: str = "unet", **metadata: str
) -> Callable[[Path], Lora]:
    def make(path_of_file: Path) -> Lora:
        a, b = factors(0, 2, width, 3)
        key = f"{component}.{path}"
        path_of_file.write_bytes(lora_bytes({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, metadata))
        return read_lora(str(path_of_file))

    return make


@pytest.mark.parametrize(
    ("make", "base"),
    [
        (attention(768), "SD 1.x"),
        (attention(1024), "SD 2.x"),
        (attention(2048), "SDXL"),
        (attention(96), "a model of text width 96"),
        (attention(768, TEXT, "text_encoder"), "SD 1.x or SDXL"),
        (attention(768, TEXT, "text_encoder", **{"modelspec.architecture": "stable-diffusion-v1/lora"}), "SD 1.x"),
        (attention(768, TEXT, "text_encoder", ss_base_model_version="sdxl_base_v1-0"), "SDXL"),
        (attention(768, TEXT, "text_encoder", ss_base_model_version="sd_v2"), "SD 1.x or SDXL"),
        (attention(1024, TEXT, "text_encoder"), "SD 2.x"),
        (attention(1280, TEXT, "text_encoder_2"), "SDXL"),
        (attention(320, f"{UNET}.to_q"), "unknown"),
        (attention(768, FC1, "text_encoder"), "SD 1.x or SDXL"),
        (attention(4096, FC2, "text_encoder"), "SD 2.x"),
        (attention(640, f"{DEEP}.to_q"), "SDXL"),
        (attention(48, f"{DEEP}.to_q"), "unknown"),
        (attention(320, f"{UNET}.to_q", ss_base_model_version="sd_v1"), "SD 1.x"),
        *(
            (attention(320, f"{UNET}.to_q", **{key: told}), base)
            for key, told, base in (
                ("modelspec.architecture", "stable-diffusion-v1/lora", "SD 1.x"),
                ("modelspec.architecture", "stable-diffusion-v2-768-v/lora", "SD 2.x"),
                ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora", "SDXL"),
                ("modelspec.architecture", "flux-1-dev/lora", "unknown"),
                ("ss_base_model_version", "sdxl_base_v1-0", "SDXL"),
                ("ss_base_model_version", "sd_v2_v", "SD 2.x"),
                ("ss_sd_model_name", "realisticVision_v20.safetensors", "unknown"),
            )
        ),
    ],
)
def test_the_base_model_is_told_by_widths_then_by_headers(tmp_path: Path, make: Any, base: str) -> None:
    assert make(tmp_path / "a.safetensors").base == base


@pytest.mark.parametrize(
    ("path", "base"),
    [
        ("runwayml/stable-diffusion-v1-5", "SD 1.x"),
        ("CompVis/stable-diffusion-v1-4", "SD 1.x"),
        ("/home/axl/stable-diffusion-v1-5/", "SD 1.x"),
        (r"D:\sdxl\stable-diffusion-v1-5", "SD 1.x"),
        (f"/cache/models--sdxl--stable-diffusion-v1-5/snapshots/{'0af' * 13}1/text_encoder", "SD 1.x"),
        ("stabilityai/stable-diffusion-2-1", "SD 2.x"),
        ("stabilityai/stable-diffusion-2", "SD 2.x"),
        ("me/sd21", "SD 2.x"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "SDXL"),
        ("stabilityai/sdxl-turbo", "SDXL"),
        ("me/realistic_v20", "SD 1.x or SDXL"),
        ("me/axle-v15", "SD 1.x or SDXL"),
        ("me/sd2024", "SD 1.x or SDXL"),
    ],
)
def test_the_base_model_is_told_by_the_last_part_of_its_path(tmp_path: Path, path: str, base: str) -> None:
    width = 1024 if base == "SD 2.x" else 768
    made = Made().add(KEY, *(f"base_model.model.{TEXT}.lora_{x}.weight" for x in "AB"), shape=(6, width))
    made.add("unet", f"unet.{UNET}.to_q.lora_A.weight", f"unet.{UNET}.to_q.lora_B.weight")
    if base == "SD 2.x":  # whose width would tell as well
        made.tensors = {key: value for key, value in made.tensors.items() if key.startswith("unet")}
    made.save(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "base_model_name_or_path": path}))
    assert read_lora(str(tmp_path)).base == base


def test_one_file_of_two_bases_is_refused(tmp_path: Path) -> None:
    made = Made()
    for name, width in (("to_k", 768), ("to_v", 2048)):
        made.add(f"unet.{UNET}.{name}", *(f"unet.{UNET}.{name}.lora_{x}.weight" for x in "AB"), shape=(6, width))
    path = made.save(tmp_path / "a.safetensors")
    with pytest.raises(TexforceError, match=r"mixes base models \('unet.*to_k' is of SD 1.x, 'unet.*to_v' of SDXL"):
        read_lora(str(path))


def test_the_second_encoder_alone_is_known_by_its_folder_or_its_width(tmp_path: Path) -> None:
    for width, where in ((1280, "a"), (1280, "b/text_encoder_2"), (6, "c/text_encoder_2")):
        made = Made()
        for name, shape in (("self_attn.q_proj", (width, width)), ("mlp.fc2", (width, 4 * width))):
            key = f"text_model.encoder.layers.0.{name}"
            made.add(f"text_encoder_2.{key}", *(f"base_model.model.{key}.lora_{x}.weight" for x in "AB"), shape=shape)
        folder = made.save(tmp_path / where / "adapter_model.safetensors").parent
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
        for source in {folder, tmp_path / where.partition("/")[0]}:
            assert close(deltas(source), made.wanted)


def test_the_second_encoder_is_known_by_what_its_layers_take_alone(tmp_path: Path) -> None:
    """Not by a rank of 1280, and by its mlp as well as by its attention."""
    for index, (name, shape, rank, component) in enumerate(
        [
            ("self_attn.q_proj", (768, 768), 1280, "text_encoder"),
            ("mlp.fc1", (5120, 1280), 4, "text_encoder_2"),
            ("mlp.fc2", (1280, 5120), 4, "text_encoder_2"),
            ("mlp.fc2", (768, 3072), 4, "text_encoder"),
            ("mlp.fc2", (1280, 1280), 4, "text_encoder"),
        ]
    ):
        key = f"text_model.encoder.layers.0.{name}"
        made = Made().add(key, *(f"base_model.model.{key}.lora_{x}.weight" for x in "AB"), shape=shape, rank=rank)
        assert read_lora(str(made.save(tmp_path / f"{index}.safetensors"))).components == (component,)


@pytest.mark.parametrize(
    ("alpha", "sentence"), [(1e200, "holds numbers beyond float32 in 'lora_te"), (-1e31, "gives 'lora_te.*' as -1e")]
)
def test_an_absurd_alpha_is_one_sentence(tmp_path: Path, capsys: Any, alpha: float, sentence: str) -> None:
    key = "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
    made = Made().add(f"text_encoder.{TEXT}", f"{key}.lora_down.weight", f"{key}.lora_up.weight")
    made.tensors[f"{key}.alpha"] = np.array(alpha)
    path = made.save(tmp_path / "a.safetensors")
    with pytest.raises(TexforceError, match=sentence):
        read_lora(str(path))
    assert app.run(["fuse", "--inspect", str(path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_alpha_may_be_an_integer_and_its_absence_is_told(tmp_path: Path) -> None:
    key = "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
    made = Made().add(f"text_encoder.{TEXT}", f"{key}.lora_down.weight", f"{key}.lora_up.weight", scale=0.5)
    made.tensors[f"{key}.alpha"] = np.array(2)  # as diffusers' convert_state_dict_to_kohya writes it
    assert close(deltas(made.save(tmp_path / "a.safetensors")), made.wanted)
    folder, wanted = peft_folder(tmp_path / "x")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16}')
    assert close(deltas(folder), {name: delta / 2 for name, delta in wanted.items()})  # PEFT's default alpha is 8
    (folder / "adapter_config.json").unlink()
    lora = read_lora(str(folder))
    assert close(deltas(lora), wanted)
    assert "its alpha is not known" in lora.warnings[0]


def test_the_config_of_a_peft_adapter_counts_among_its_files(tmp_path: Path) -> None:
    """Pictures of another alpha are others."""
    folder, _ = peft_folder(tmp_path)
    weights, config = read_lora(str(folder)).sha256()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16, "lora_alpha": 40}')
    again, changed = read_lora(str(folder)).sha256()
    assert again == weights and changed != config


def test_a_peft_adapter_that_was_renamed_keeps_its_config_while_that_can_be_of_no_other(tmp_path: Path) -> None:
    folder, wanted = peft_folder(tmp_path / "x")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16, "lora_alpha": 64}')
    file = (folder / "adapter_model.safetensors").rename(folder / "style.safetensors")
    for source in (folder, file):
        assert close(deltas(source), {name: 4 * delta for name, delta in wanted.items()})
    made, _ = kohya(tmp_path / "y")
    made.rename(folder / "style-0.5.safetensors")
    assert close(deltas(file), {name: 4 * delta for name, delta in wanted.items()})
    torch.save({"base_model.model.x": torch.ones(1)}, folder / "adapter_model.bin")
    assert "surely its own" in read_lora(str(file)).warnings[0]
    (folder / "adapter_model.bin").unlink()
    (folder / "half.safetensors").write_bytes(b"")
    assert "surely its own" in read_lora(str(file)).warnings[0]
    (folder / "half.safetensors").unlink()
    (folder / "other.safetensors").write_bytes(file.read_bytes())
    assert "has no adapter_config.json that is surely its own: its alpha" in read_lora(str(file)).warnings[0]


def test_a_file_that_has_gone_while_it_was_to_be_hashed_is_one_sentence(tmp_path: Path) -> None:
    path, _ = kohya(tmp_path / "x")
    lora = read_lora(str(path))
    path.unlink()
    with pytest.raises(TexforceError, match=r"a.safetensors' could not be read \(No such file"):
        lora.sha256()


def test_a_pickle_beside_the_weights_is_passed_over(tmp_path: Path) -> None:
    folder, wanted = FORMATS["PEFT, folders"](tmp_path / "x")
    (folder / "unet" / "adapter_model.bin").write_bytes(b"\x80\x02.")
    assert close(deltas(folder), wanted)


@pytest.mark.parametrize("source", ["a" * 300, "~nobody-of-that-name/a.safetensors", "a\0b"])
def test_a_path_that_cannot_be_is_one_sentence(source: str) -> None:
    with pytest.raises(UsageError, match=r"cannot be looked at|there is no LoRA"):
        find_lora(source)


def test_loras_of_different_bases_are_told_apart(tmp_path: Path) -> None:
    one, two = attention(768)(tmp_path / "a.safetensors"), attention(1024)(tmp_path / "b.safetensors")
    with pytest.raises(TexforceError, match=r"'.*b.safetensors' and '.*a.safetensors' were made for different base"):
        common_bases([one, two])
    text = attention(1024, TEXT, "text_encoder")(tmp_path / "c.safetensors")
    shown = r"c.safetensors' was made for SD 2.x, as 'text_encoder\.\S+' shows, '.*a.safetensors' for SD 1.x"
    with pytest.raises(TexforceError, match=shown):
        common_bases([one, text])
    told = replace(text, modules={}, bases=frozenset({"SDXL"}))
    with pytest.raises(TexforceError, match=r"c.safetensors' was made for SDXL, '.*a.safetensors' for SD 1.x"):
        common_bases([one, told])
    either = attention(768, TEXT, "text_encoder")(tmp_path / "d.safetensors")
    assert common_bases([either, one]) == {"SD 1.x"}
    second = attention(1280, TEXT, "text_encoder_2")(tmp_path / "e.safetensors")
    with pytest.raises(TexforceError, match=r"e.safetensors' was made for SDXL, as .*, '.*a.safetensors' for SD 1.x"):
        common_bases([one, either, second])


def test_a_pickle_of_tensors_that_are_no_plain_arrays_is_one_sentence(tmp_path: Path) -> None:
    torch.save({f"{KEY}.lora_A.weight": torch.eye(3).to_sparse()}, tmp_path / "a.bin")
    with pytest.raises(TexforceError, match=rf"a.bin' holds '{KEY}.lora_A.weight' as no plain tensor"):
        read_lora(str(tmp_path / "a.bin"), allow_pickle=True)


@pytest.mark.filterwarnings("error")
def test_a_product_that_overflows_reaches_no_model(tmp_path: Path) -> None:
    made = Made().add(KEY, *(f"{KEY}.lora_{x}.weight" for x in "AB"))
    made.tensors[f"{KEY}.lora_B.weight"] *= np.float32(1e38)
    lora = read_lora(str(made.save(tmp_path / "a.safetensors")))
    with pytest.raises(TexforceError, match=rf"a.safetensors' makes '{KEY}' infinite at 1000 times what it holds"):
        lora.arrays(lambda component: 1000.0)
    with pytest.raises(TexforceError, match="infinite at 1e"):
        lora.arrays(lambda component: 1e308)


def test_a_folder_that_is_replaced_is_back_after_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "out", Path.replace
    out.mkdir()
    (out / "old").touch()
    for when in ("before", "after"):

        def interrupted(self: Path, target: Path, when: str = when) -> Path:
            if self.suffix == ".tmp" and when == "before":
                raise KeyboardInterrupt
            moved = rename(self, target)
            if target.suffix == ".old" and when == "after":
                raise KeyboardInterrupt
            return moved

        monkeypatch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt), new_lora(out, "peft", force=True) as temporary:
            (temporary / "new").touch()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in out.iterdir()] == ["old"]
    monkeypatch.undo()
    with new_lora(out, "peft", force=True) as temporary:
        (temporary / "new").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/new"]


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_what_appears_while_a_lora_is_made_is_not_replaced_without_force(tmp_path: Path, form: Any) -> None:
    out = tmp_path / "out.safetensors"

    def write(text: str, force: bool, meanwhile: bool) -> None:
        with new_lora(out, form, force=force) as temporary:
            (temporary / "x" if form == "peft" else temporary).write_text(text)
            if meanwhile and form == "peft":
                out.mkdir()
                (out / "x").write_text("theirs")
            elif meanwhile:
                out.write_text("theirs")

    with pytest.raises(UsageError, match=r"out.safetensors' has appeared meanwhile"):
        write("ours", force=False, meanwhile=True)
    assert (out / "x" if form == "peft" else out).read_text() == "theirs"
    write("ours", force=True, meanwhile=False)
    assert (out / "x" if form == "peft" else out).read_text() == "ours"
    out = tmp_path / "new.safetensors"
    write("ours", force=False, meanwhile=False)
    assert (out / "x" if form == "peft" else out).read_text() == "ours"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.safetensors", "out.safetensors"]


def test_arrays_have_scale_and_weight_in_b(tmp_path: Path) -> None:
    path, wanted = kohya(tmp_path / "x")
    arrays = read_lora(str(path)).arrays(lambda component: 0.5 if component == "unet" else -2.0)
    for name, delta in wanted.items():
        a, b = arrays[f"{name}.lora_A.weight"], arrays[f"{name}.lora_B.weight"]
        assert a.ndim == b.ndim
        weight = 0.5 if name.startswith("unet") else -2.0
        found = b.reshape(b.shape[:2]).astype(float) @ a.reshape(len(a), -1)
        assert np.allclose(found, weight * delta, rtol=0, atol=1e-5)
