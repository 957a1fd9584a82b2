"""What the keys of LoRA files mean: every naming in use, read into one, and the one written in the others.

The one: a component (`text_encoder`, `text_encoder_2`, `unet`) and a module's path in it as diffusers names it, text
encoders with the level `text_model.` (transformers >= 5.6 dropped it from CLIPTextModel, files keep it).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Role = Literal["A", "B", "alpha"]

COMPONENTS = ("text_encoder", "text_encoder_2", "unet")

_ROLES: dict[str, Role] = {"A": "A", "B": "B", "down": "A", "up": "B"}
_SUFFIXES = (  # (what follows the module's name, the format it tells)
    (re.compile(r"(?P<module>.+)\.lora_(?P<role>[AB])(?:\.(?!weight$|bias$)[^.]+)?\.weight"), "diffusers"),
    (re.compile(r"(?P<module>.+)\.lora_linear_layer\.(?P<role>down|up)\.weight"), "old diffusers"),
    (re.compile(r"(?P<module>.+\.to_(?:q|k|v|out))_lora\.(?P<role>down|up)\.weight"), "old diffusers"),
    (re.compile(r"(?P<module>.+)\.lora\.(?P<role>down|up)\.weight"), "old diffusers"),
    (re.compile(r"(?P<module>.+)\.lora_(?P<role>down|up)\.weight"), "kohya"),
)
_ALPHA = re.compile(r"(?P<module>.+?)(?:_lora|\.lora|\.lora_linear_layer)?\.alpha")
_KOHYA = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_unet_": "unet",
    "lycoris_": "unet",  # as SimpleTuner writes it
}
_PREFIXES = {
    "unet.unet.": "unet",  # as the training scripts of diffusers 0.23 wrote it
    **{f"{component}.": component for component in COMPONENTS},
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    # ComfyUI's own names
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "clip_l.": "text_encoder",
    "clip_g.": "text_encoder_2",
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
}
_TEXT_PARTS = ("encoder.", "embeddings.", "final_layer_norm")
_UNET_PARTS = (
    "down_blocks.",
    "up_blocks.",
    "mid_block.",
    "conv_in",
    "conv_out",
    "conv_norm_out",
    "time_embedding.",
    "add_embedding.",
)
_BLOCK_PARTS = (
    r"resnets\.[012]\.(conv1|conv2|norm1|norm2|time_emb_proj|conv_shortcut)"
    r"|attentions\.[012]\.(norm|proj_in|proj_out|transformer_blocks\.\d\."
    r"(norm[123]|attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)))"
)
_UNET = re.compile(
    rf"(down_blocks|up_blocks)\.[0-3]\.({_BLOCK_PARTS}|(downsamplers|upsamplers)\.0\.conv)"
    rf"|mid_block\.(?!resnets\.2|attentions\.[12])({_BLOCK_PARTS})"
    r"|conv_in|conv_out|conv_norm_out|(time|add)_embedding\.linear_[12]"
)
_TEXT = re.compile(
    r"text_model\.(embeddings\.(token|position)_embedding|final_layer_norm"
    r"|encoder\.layers\.([12]?\d|3[01])\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12]))|text_projection"
)
_OLD_TEXT = {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out": ".out_proj"}
_WORDS = (  # the parts of module names that hold an underscore; kohya's keys write the dots so as well
    "text_model self_attn q_proj k_proj v_proj out_proj final_layer_norm text_projection token_embedding "
    "position_embedding down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out "
    "conv_in conv_out conv_norm_out conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2 "
    "input_blocks middle_block output_blocks in_layers emb_layers out_layers skip_connection time_embed label_emb"
).split()
_PROTECTED = re.compile(rf"(?<![a-z0-9])({'|'.join(sorted(_WORDS, key=len, reverse=True))})(?![a-z0-9])")
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_ORIGINAL = {name: original for original, name in {**_RESNET, **_OUTSIDE}.items()}
_LAYER = re.compile(
    r"(?P<side>down|up|mid)_blocks?\.((?P<block>\d)\.)?"
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d)\.(?P<inside>.+)"
)
_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d{1,3})\.(\d)\.(.+)|middle_block\.([012])\.(.+)")

REFUSED = (
    (re.compile(r"\.hada_w"), "a LoHa (Hadamard products)"),
    (re.compile(r"\.lokr_w"), "a LoKr (Kronecker products)"),
    (re.compile(r"\.lora_mid\."), "a LoCon in Tucker form (lora_mid)"),
    (re.compile(r"\.dora_scale$|\.lora_magnitude_vector"), "a DoRA"),
    (re.compile(r"\.oft_|\.boft_"), "an OFT (orthogonal fine-tuning)"),
    (re.compile(r"\.[ab][12]\.weight$"), "a GLoRA"),
    (re.compile(r"\.on_input$"), "an IA3"),
    (re.compile(r"\.[wb]_norm$"), "a LyCORIS file with changed norms"),
    (re.compile(r"\.diff(_b)?$"), "a LyCORIS file with full differences"),
    (re.compile(r"\.lora_embedding_[AB]"), "a LoRA of an embedding"),
    (re.compile(r"\.lora_(B|up)(\.[^.]+)?\.bias$"), "a LoRA with a bias (lora_bias)"),
    (re.compile(r"^(emb_params|clip_[lg]|<.*>)$"), "a textual inversion"),
    (re.compile(r"^(unet|text_encoder):\d+:(up|down)$"), "a LoRA whose layers have numbers for names (cloneofsimo's)"),
    (re.compile(r"^(controlnet_|control_model\.)"), "a ControlNet"),
    (re.compile(r"^bundle_emb\."), "a LoRA with textual inversions in it (bundle_emb)"),
)
"""What cannot be merged as a LoRA, by its keys."""


@dataclass(frozen=True)
class Place:
    """What one key is: the component and path of the module (None where unknown), the role of the tensor, the format.

    `bare` where the component was guessed, since the key names none.
    """

    component: str
    path: str
    role: Role
    format: str
    bare: bool = False

    @property
    def module(self) -> str:
        """Component and path in one."""
        return f"{self.component}.{self.path}"


def parse_key(key: str) -> Place | None:
    """What a key is; None where it is none of a LoRA that is known."""
    role: Role = "alpha"
    found, format = _ALPHA.fullmatch(key), "kohya"
    if found is None:
        for pattern, told in _SUFFIXES:
            found = pattern.fullmatch(key)
            if found:
                role, format = _ROLES[found["role"]], told
                break
    located = locate(found["module"]) if found else None
    if located is None:
        return None
    component, path, naming = located
    if naming == "bare" and format == "old diffusers":
        format = "bare attention processors"
    elif naming:
        format = naming if naming != "bare" else "PEFT"
    return Place(component, path, role, format, bare=naming in ("bare", "PEFT"))


def locate(module: str) -> tuple[str, str, str] | None:
    """Component, path and naming of a module as some format names it: `lora_te_...`, `unet....`, `base_model.model....`.

    The naming is "" where it is diffusers' own.
    """
    naming = ""
    if module.startswith("base_model.model."):
        naming, module = "PEFT", module.removeprefix("base_model.model.")
    for prefix, component in _KOHYA.items():
        if module.startswith(prefix):
            path = _dotted(module.removeprefix(prefix))
            return _known(component, path, "kohya, sgm names" if _is_sgm(path) else "kohya")
    for prefix, component in _PREFIXES.items():
        if module.startswith(prefix):
            path = module.removeprefix(prefix).removeprefix("base_model.model.")
            return _known(component, path, naming or ("sgm names" if _is_sgm(path) else ""))
    if module.startswith(("text_model.", "text_projection", *_TEXT_PARTS)):
        return _known("text_encoder", module, naming or "bare")
    if module.startswith(_UNET_PARTS) or _is_sgm(module):
        return _known("unet", module, naming or "bare")
    return None


def kohya_name(component: str, path: str, bases: Collection[str]) -> str:
    """The module's name in kohya's form, which A1111 and ComfyUI read: `lora_te_text_model_encoder_...`.

    `lora_te1` is SDXL's first encoder, and where it may be that or SD 1.x's: as such it is looked up in both. Of SDXL alone
    kohya trains the U-Net of the original code: the names of diffusers do not bring all of it into A1111.
    """
    first = "lora_te1" if "SDXL" in bases else "lora_te"
    prefix = {"text_encoder": first, "text_encoder_2": "lora_te2", "unet": "lora_unet"}
    path = _to_sgm(path) if set(bases) == {"SDXL"} and component == "unet" else path
    return f"{prefix[component]}_{path.replace('.', '_')}"


def peft_name(component: str, path: str, *, level: bool) -> str:
    """The module's name in a PEFT folder, which is the one in the live model: CLIPTextModel has the `level` text_model in
    transformers < 5.6, the second encoder of SDXL always."""
    return f"base_model.model.{path if level or component != 'text_encoder' else path.removeprefix('text_model.')}"


def _known(component: str, path: str, naming: str) -> tuple[str, str, str] | None:
    path = path.replace(".processor.", ".").removesuffix(".processor")
    if component == "unet":
        sgm = _from_sgm(path) if _is_sgm(path) else path
        if sgm is None:
            return None
        path = f"{sgm}.0" if sgm.endswith(".to_out") else sgm
        if not _UNET.fullmatch(path):
            return None
    else:
        if path.startswith(_TEXT_PARTS):
            path = f"text_model.{path}"
        for old, new in _OLD_TEXT.items():
            path = path.removesuffix(old) + new if path.endswith(f".self_attn{old}") else path
        if not _TEXT.fullmatch(path):
            return None
    return component, path, naming


def is_convolution(path: str) -> bool | None:
    """Whether a module is a convolution; None for proj_in and proj_out, which are one in SD 1.x and linear in the others."""
    last = path.rpartition(".")[2]
    if last in ("proj_in", "proj_out"):
        return None
    return last.startswith("conv")


def _dotted(flat: str) -> str:
    """`down_blocks_0_attentions_0_proj_in` -> `down_blocks.0.attentions.0.proj_in`."""
    shielded = _PROTECTED.sub(lambda match: match[0].replace("_", "\0"), flat)
    return shielded.replace("_", ".").replace("\0", "_")


def _is_sgm(path: str) -> bool:
    return path.startswith(("input_blocks.", "output_blocks.", "middle_block.", "out.", "time_embed.", "label_emb."))


def _from_sgm(path: str) -> str | None:
    """A U-Net module of the original layout by its name in diffusers, for two resnets a block (SD 1.x, SD 2.x, SDXL)."""
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    match = _BLOCK.fullmatch(path)
    if match is None:
        return None
    if match[5]:
        part, inside = int(match[5]), match[6]
        return f"mid_block.attentions.0.{inside}" if part == 1 else _resnet(f"mid_block.resnets.{part // 2}", inside)
    down, index, part, inside = (
        match[1] == "input_blocks",
        int(match[2]) - (match[1] == "input_blocks"),
        int(match[3]),
        match[4],
    )
    block, layer = divmod(index, 3)
    where = f"{'down' if down else 'up'}_blocks.{block}"
    if inside in ("op", "conv"):
        return f"{where}.{'downsamplers' if down else 'upsamplers'}.0.conv"
    return f"{where}.attentions.{layer}.{inside}" if part else _resnet(f"{where}.resnets.{layer}", inside)


def _to_sgm(path: str) -> str:
    """The name in the original code of a module of SDXL's U-Net: where it has upsamplers, they come behind an attention."""
    if path in _ORIGINAL:
        return _ORIGINAL[path]
    layer = _LAYER.fullmatch(path)
    assert layer is not None, path
    kind, index, inside = layer["kind"], int(layer["layer"]), layer["inside"]
    inside = _ORIGINAL[inside] if kind == "resnets" else inside
    if layer["side"] == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{inside}"
    first = 3 * int(layer["block"])
    if kind == "downsamplers":
        return f"input_blocks.{first + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + 2}.2.conv"
    where = f"input_blocks.{first + index + 1}" if layer["side"] == "down" else f"output_blocks.{first + index}"
    return f"{where}.{int(kind == 'attentions')}.{inside}"


def _resnet(where: str, inside: str) -> str | None:
    return f"{where}.{_RESNET[inside]}" if inside in _RESNET else None
