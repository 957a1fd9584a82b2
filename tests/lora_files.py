"""LoRA files in every format, their keys spelled out here, with the change that each must give."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from texforce_cli.lora.lora import Lora
from texforce_cli.lora.read import read_lora

Arrays = dict[str, np.ndarray[Any, Any]]


def factors(seed: int, rank: int, inputs: int, outputs: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rank, inputs)), rng.standard_normal((outputs, rank))
    return a.astype(np.float32), b.astype(np.float32)


def deltas(lora: Lora | str | Path) -> Arrays:
    """The dense change of each module, through our reader."""
    lora = lora if isinstance(lora, Lora) else read_lora(str(lora))
    return {name: module.scale * module.b().astype(float) @ module.a() for name, module in lora.modules.items()}


def close(found: Mapping[str, Any], wanted: Mapping[str, Any], tolerance: float = 1e-6) -> bool:
    """The same modules, each within `tolerance` of its norm."""
    assert found.keys() == wanted.keys()
    return all(
        np.linalg.norm(found[name] - wanted[name].reshape(found[name].shape))
        <= tolerance * np.linalg.norm(wanted[name])
        for name in wanted
    )


@dataclass
class Made:
    """A file in the making: `add` gives each module its factors under the keys of the format."""

    tensors: Arrays = field(default_factory=dict)
    wanted: Arrays = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def add(
        self,
        canonical: str,
        down: str,
        up: str,
        *,
        rank: int = 4,
        shape: tuple[int, int] = (6, 5),
        scale: float = 1.0,
        alpha: tuple[str, float] | None = None,
        kernel: tuple[int, ...] = (),
    ) -> Made:
        """One module of (outputs, inputs); `alpha` is (key, value), `scale` what it must amount to."""
        outputs, inputs = shape
        cells = int(np.prod(kernel))
        a, b = factors(len(self.tensors), rank, inputs * cells, outputs)
        self.wanted[canonical] = scale * b.astype(float) @ a
        self.tensors[down] = a.reshape(rank, inputs, *kernel)
        self.tensors[up] = b.reshape(outputs, rank, *(1 for _ in kernel))
        if alpha:
            self.tensors[alpha[0]] = np.array(alpha[1], np.float32)
        return self

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(self.tensors, path, metadata=self.metadata or None)
        return path


def attention_layers(count: int) -> list[str]:
    """So many layers of a U-Net, all of one kind, of the 960 that its names have room for."""
    places = itertools.product(("to_q", "to_k", "to_v", "to_out.0"), ("down", "up"), range(4), range(3), range(10))
    return [f"{k}_blocks.{i}.attentions.{j}.transformer_blocks.{n}.attn1.{name}" for name, k, i, j, n in places][:count]


TEXT = "text_model.encoder.layers.1.self_attn.q_proj"
UNET = "down_blocks.0.attentions.1.transformer_blocks.0.attn2"


def peft_folder(folder: Path) -> tuple[Path, Arrays]:
    """What the official TexForce release looks like: r = alpha = 16, with `text_model.`."""
    made = Made()
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        key = f"text_model.encoder.layers.0.self_attn.{name}"
        made.add(
            f"text_encoder.{key}", *(f"base_model.model.{key}.lora_{x}.weight" for x in "AB"), rank=16, shape=(32, 32)
        )
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q_proj"], "lora_dropout": 0.0}
    made.save(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, made.wanted


def peft_patterns(folder: Path) -> tuple[Path, Arrays]:
    """Without `text_model.`, use_rslora, another rank and alpha for one module."""
    made = Made()
    for name, rank, alpha in (("q_proj", 4, 8.0), ("out_proj", 9, 3.0)):
        made.add(
            f"text_encoder.text_model.encoder.layers.0.self_attn.{name}",
            *(f"base_model.model.encoder.layers.0.self_attn.{name}.lora_{x}.weight" for x in "AB"),
            rank=rank,
            scale=alpha / rank**0.5,
        )
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "rank_pattern": {"out_proj": 9},
        "alpha_pattern": {"layers.0.self_attn.out_proj": 3},
    }
    made.save(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, made.wanted


def peft_parts(folder: Path) -> tuple[Path, Arrays]:
    """Both encoders of SDXL and the U-Net, in folders of their own."""
    wanted: Arrays = {}
    for component, key in (("text_encoder", TEXT), ("text_encoder_2", TEXT), ("unet", f"{UNET}.to_q")):
        made = Made().add(f"{component}.{key}", *(f"base_model.model.{key}.lora_{x}.weight" for x in "AB"), scale=0.5)
        made.save(folder / component / "adapter_model.safetensors")
        (folder / component / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 2}')
        wanted |= made.wanted
    return folder, wanted


def diffusers_new(folder: Path) -> tuple[Path, Arrays]:
    """Two encoders and a U-Net, alpha = 2 r in the header, one module's alpha apart."""
    header = {
        "text_encoder.r": 4,
        "text_encoder.lora_alpha": 8,
        "text_encoder_2.r": 4,
        "text_encoder_2.lora_alpha": 4,
        "unet.r": 4,
        "unet.lora_alpha": 8,
        "unet.alpha_pattern": {f"{UNET}.to_out.0": 1.0},
    }
    made = Made(metadata={"lora_adapter_metadata": json.dumps(header)})
    made.add(f"text_encoder.{TEXT}", *(f"text_encoder.{TEXT}.lora_{x}.weight" for x in "AB"), scale=2)
    bare = TEXT.removeprefix("text_model.")
    made.add(f"text_encoder_2.{TEXT}", *(f"text_encoder_2.{bare}.lora_{x}.weight" for x in "AB"), scale=1)
    made.add(f"unet.{UNET}.to_k", *(f"unet.{UNET}.to_k.lora_{x}.weight" for x in "AB"), scale=2)
    made.add(f"unet.{UNET}.to_out.0", *(f"unet.{UNET}.to_out.0.lora_{x}.weight" for x in "AB"), scale=0.25)
    conv = "unet.up_blocks.1.resnets.0.conv1"
    made.add(conv, f"{conv}.lora_A.weight", f"{conv}.lora_B.weight", scale=2, kernel=(3, 3))
    return made.save(folder / "a.safetensors"), made.wanted


def diffusers_old(folder: Path) -> tuple[Path, Arrays]:
    made = Made()
    text = "text_encoder.text_model.encoder.layers.0"
    made.add(f"{text}.mlp.fc1", *(f"{text}.mlp.fc1.lora_linear_layer.{x}.weight" for x in ("down", "up")))
    made.add(
        f"{text}.self_attn.out_proj",
        *(f"{text}.self_attn.to_out_lora.{x}.weight" for x in ("down", "up")),
        scale=0.5,
        alpha=(f"{text}.self_attn.to_out_lora.alpha", 2.0),
    )
    made.add(f"unet.{UNET}.to_q", *(f"unet.{UNET}.processor.to_q_lora.{x}.weight" for x in ("down", "up")))
    made.add(f"unet.{UNET}.to_out.0", *(f"unet.{UNET}.processor.to_out_lora.{x}.weight" for x in ("down", "up")))
    proj = "unet.down_blocks.0.attentions.1.proj_in"
    made.add(proj, *(f"{proj}.lora.{x}.weight" for x in ("down", "up")))
    return made.save(folder / "a.safetensors"), made.wanted


def attention_processors(folder: Path) -> tuple[Path, Arrays]:
    """ReFL-style: no `unet.` anywhere."""
    made = Made()
    for name, module in (("to_q", "to_q"), ("to_out", "to_out.0")):
        made.add(f"unet.{UNET}.{module}", *(f"{UNET}.processor.{name}_lora.{x}.weight" for x in ("down", "up")))
    return made.save(folder / "a.safetensors"), made.wanted


def kohya(folder: Path) -> tuple[Path, Arrays]:
    """Alphas that vary by module, an absent one, mixed ranks, a LoCon convolution."""
    made = Made(metadata={"ss_base_model_version": "sd_v1"})
    modules = [
        (f"text_encoder.{TEXT}", "lora_te_text_model_encoder_layers_1_self_attn_q_proj", 4, 1.0, ()),
        (f"unet.{UNET}.to_k", "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k", 8, 16.0, ()),
        (
            f"unet.{UNET}.to_out.0",
            "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0",
            4,
            None,
            (),
        ),
        ("unet.down_blocks.0.attentions.1.proj_in", "lora_unet_down_blocks_0_attentions_1_proj_in", 4, 2.0, (1, 1)),
        ("unet.mid_block.resnets.1.conv_shortcut", "lora_unet_mid_block_resnets_1_conv_shortcut", 4, 2.0, (1, 1)),
        ("unet.up_blocks.2.upsamplers.0.conv", "lora_unet_up_blocks_2_upsamplers_0_conv", 2, 2.0, (3, 3)),
    ]
    for canonical, key, rank, alpha, kernel in modules:
        made.add(
            canonical,
            f"{key}.lora_down.weight",
            f"{key}.lora_up.weight",
            rank=rank,
            scale=1.0 if alpha is None else alpha / rank,
            alpha=None if alpha is None else (f"{key}.alpha", alpha),
            kernel=kernel,
        )
    return made.save(folder / "a.safetensors"), made.wanted


SGM = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_transformer_blocks_1_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
    "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
    "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
    "middle_block_1_transformer_blocks_9_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_0_1_transformer_blocks_0_attn2_to_v": "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
    "input_blocks_5_1_transformer_blocks_0_attn1_to_out_0": "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0",
    "input_blocks_7_0_out_layers_3": "down_blocks.2.resnets.0.conv2",
    "output_blocks_1_1_transformer_blocks_3_ff_net_2": "up_blocks.0.attentions.1.transformer_blocks.3.ff.net.2",
    "output_blocks_3_0_skip_connection": "up_blocks.1.resnets.0.conv_shortcut",
    "output_blocks_5_1_proj_out": "up_blocks.1.attentions.2.proj_out",
    "output_blocks_8_0_in_layers_2": "up_blocks.2.resnets.2.conv1",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_2": "conv_out",
}


def kohya_sdxl(folder: Path) -> tuple[Path, Arrays]:
    """SDXL: two encoders, the U-Net under the names of the original code."""
    made = Made(metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    for component, prefix in (("text_encoder", "lora_te1"), ("text_encoder_2", "lora_te2")):
        key = f"{prefix}_text_model_encoder_layers_1_self_attn_q_proj"
        made.add(
            f"{component}.{TEXT}",
            f"{key}.lora_down.weight",
            f"{key}.lora_up.weight",
            scale=0.5,
            alpha=(f"{key}.alpha", 2.0),
        )
    for name, module in SGM.items():
        key = f"lora_unet_{name}"
        made.add(
            f"unet.{module}", f"{key}.lora_down.weight", f"{key}.lora_up.weight", scale=0.5, alpha=(f"{key}.alpha", 2.0)
        )
    return made.save(folder / "a.safetensors"), made.wanted


def sgm_dotted(folder: Path) -> tuple[Path, Arrays]:
    """The names of the original code with dots, as ComfyUI's generic form has them."""
    key = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k"
    made = Made().add(
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        *(f"{key}.lora_{x}.weight" for x in ("down", "up")),
    )
    return made.save(folder / "a.safetensors"), made.wanted


def comfyui(folder: Path) -> tuple[Path, Arrays]:
    """ComfyUI's own names of both encoders, and SimpleTuner's of the U-Net."""
    made = Made()
    for component, prefix in (("text_encoder", "text_encoders.clip_l.transformer"), ("text_encoder_2", "clip_g")):
        made.add(f"{component}.{TEXT}", *(f"{prefix}.{TEXT}.lora_{x}.weight" for x in ("down", "up")))
    key = "lycoris_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    made.add(path, f"{key}.lora_down.weight", f"{key}.lora_up.weight", scale=0.25, alpha=(f"{key}.alpha", 1.0))
    return made.save(folder / "a.safetensors"), made.wanted


FORMATS: dict[str, Callable[[Path], tuple[Path, Arrays]]] = {
    "PEFT": peft_folder,
    "PEFT, patterns": peft_patterns,
    "PEFT, folders": peft_parts,
    "diffusers": diffusers_new,
    "old diffusers": diffusers_old,
    "bare attention processors": attention_processors,
    "kohya": kohya,
    "kohya, sgm names": kohya_sdxl,
    "sgm names": sgm_dotted,
    "kohya, ComfyUI": comfyui,
}


def peak_of(arguments: list[str]) -> int:
    """The most bytes that `texforce ARGUMENTS`, which must succeed, has held in a process of its own."""
    code = (
        f"import resource; from texforce_cli.cli.app import run; assert run({arguments!r}) == 0; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    # by way of a shell: a process counts what its parent held when it was forked
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
