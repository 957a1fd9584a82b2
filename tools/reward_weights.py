"""`python -m tools.reward_weights FOLDER`: random weights in the official formats, to try every reward without a network.

File names, tensor names, types and configurations are those of the official files; the sizes are small. `--full` makes
ImageReward's and HPSv2's in the official sizes, 6 GB. The scores mean nothing. Prints what to give to `texforce train` for
each reward.
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from texforce_cli import tiny
from texforce_cli.files import write_json, write_text
from texforce_cli.rewards.builtin.scores_file import picture_hash
from texforce_cli.rewards.builtin.vision import MEAN, STD
from texforce_cli.rewards.environments import OURS, installed
from tools.tiny.tokenizer import text_options, words

_HEAD = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}  # the linear layers of LAION's predictor; ImageReward took them over
_BERT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
_SMALL_BERT = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 2}
_VIT_H = {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14}
_SMALL_VIT = {"image_size": 56, "layers": 2, "width": 80, "head_width": 40, "patch_size": 14}
_TEXT_H = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
_SMALL_TEXT = {**_TEXT_H, "width": 64, "heads": 4, "layers": 2}  # the original has one vocabulary and length
Shapes = dict[str, tuple[int, ...]]


def filled(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random tensors of these names and shapes, scaled so that numbers neither die nor explode on their way through."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) < 2:  # biases about 0, the weights of normalisations about 1
            noise = 0.1 * noise + float(name.endswith("weight"))
        else:
            noise /= math.sqrt(math.prod(shape[1:]))
        result[name] = noise.to(dtype)
    return result


def head(prefix: str, width: int) -> Shapes:
    """The five linear layers that follow an embedding."""
    shapes: Shapes = {}
    for number, outputs in _HEAD.items():
        shapes |= {f"{prefix}{number}.weight": (outputs, width), f"{prefix}{number}.bias": (outputs,)}
        width = outputs
    return shapes


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def open_clip(embedding: int, vision: Mapping[str, int], text: Mapping[str, int]) -> Shapes:
    """The tensors of open_clip's CLIP, for what its configuration files call embed_dim, vision_cfg and text_cfg."""
    width, patch = vision["width"], vision["patch_size"]
    positions = (vision["image_size"] // patch) ** 2 + 1
    return {
        "positional_embedding": (text["context_length"], text["width"]),
        "text_projection": (text["width"], embedding),
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (positions, width),
        "visual.proj": (width, embedding),
        "visual.conv1.weight": (width, 3, patch, patch),
        **_norm("visual.ln_pre", width),
        **_resblocks("visual.transformer.resblocks", width, vision["layers"]),
        **_norm("visual.ln_post", width),
        **_resblocks("transformer.resblocks", text["width"], text["layers"]),
        "token_embedding.weight": (text["vocab_size"], text["width"]),
        **_norm("ln_final", text["width"]),
    }


def _resblocks(prefix: str, width: int, layers: int) -> Shapes:
    shapes: Shapes = {}
    for block in (f"{prefix}.{i}" for i in range(layers)):
        shapes |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{block}.attn.out_proj", width, width)
        shapes |= _linear(f"{block}.mlp.c_fc", 4 * width, width) | _linear(f"{block}.mlp.c_proj", width, 4 * width)
    return shapes


def blip(size: int, width: int, layers: int, text: Mapping[str, int]) -> Shapes:
    """The tensors of ImageReward for pictures of `size` in patches of 16, and a `text` as med_config.json has it."""
    eyes, reader, inner = "blip.visual_encoder", "blip.text_encoder", text["hidden_size"]
    shapes: Shapes = {f"{eyes}.cls_token": (1, 1, width), f"{eyes}.pos_embed": (1, (size // 16) ** 2 + 1, width)}
    shapes |= {f"{eyes}.patch_embed.proj.weight": (width, 3, 16, 16), f"{eyes}.patch_embed.proj.bias": (width,)}
    for block in (f"{eyes}.blocks.{i}" for i in range(layers)):
        shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        shapes |= _linear(f"{block}.attn.qkv", 3 * width, width) | _linear(f"{block}.attn.proj", width, width)
        shapes |= _linear(f"{block}.mlp.fc1", 4 * width, width) | _linear(f"{block}.mlp.fc2", width, 4 * width)
    shapes |= _norm(f"{eyes}.norm", width)
    shapes[f"{reader}.embeddings.word_embeddings.weight"] = (text["vocab_size"], inner)
    shapes[f"{reader}.embeddings.position_embeddings.weight"] = (text["max_position_embeddings"], inner)
    shapes |= _norm(f"{reader}.embeddings.LayerNorm", inner)
    for block in (f"{reader}.encoder.layer.{i}" for i in range(text["num_hidden_layers"])):
        for attention, seen in (("attention", inner), ("crossattention", width)):
            shapes |= _linear(f"{block}.{attention}.self.query", inner, inner)
            shapes |= _linear(f"{block}.{attention}.self.key", inner, seen)
            shapes |= _linear(f"{block}.{attention}.self.value", inner, seen)
            shapes |= _linear(f"{block}.{attention}.output.dense", inner, inner)
            shapes |= _norm(f"{block}.{attention}.output.LayerNorm", inner)
        shapes |= _linear(f"{block}.intermediate.dense", text["intermediate_size"], inner)
        shapes |= _linear(f"{block}.output.dense", inner, text["intermediate_size"])
        shapes |= _norm(f"{block}.output.LayerNorm", inner)
    return shapes | _linear("blip.vision_proj", 256, width) | _linear("blip.text_proj", 256, inner)


def make_clip(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """A CLIP model with tokenizer and preprocessor, as transformers saves it: for clip-score, pickscore and aesthetic."""
    common = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = CLIPConfig(
        text_config={**common, **text_options(tokenizer)},
        vision_config={**common, "image_size": 32, "patch_size": 8},
        projection_dim=48,
    )
    model = CLIPModel(config)
    # of seeds 0 to 5 the one with the most cosines above 0: clip-score is 0 below
    weights = filled({name: tuple(t.shape) for name, t in model.state_dict().items()}, 1, torch.float32)
    model.load_state_dict(weights | {"logit_scale": torch.tensor(math.log(100))})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {"image_processor_type": "CLIPImageProcessor", "resample": 3, "image_mean": MEAN, "image_std": STD}
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    write_json(folder / "preprocessor_config.json", about | sizes)


def make_hps(folder: Path, tokenizer: CLIPTokenizer, full: bool) -> None:
    """HPS_v2_compressed.pt and HPS_v2.1_compressed.pt with tokenizer; small ones with open_clip's configuration."""
    tokenizer.save_pretrained(folder)
    vision, text = (_VIT_H, _TEXT_H) if full else (_SMALL_VIT, _SMALL_TEXT)
    embedding = 1024 if full else 48
    if not full:
        parts = {"embed_dim": embedding, "vision_cfg": vision, "text_cfg": text}
        write_json(folder / "open_clip_config.json", {"model_cfg": parts})
    for seed, version in enumerate(("v2", "v2.1")):
        tensors = filled(open_clip(embedding, vision, text), seed, torch.float16)
        torch.save({"state_dict": tensors}, folder / f"HPS_{version}_compressed.pt")


def make_image_reward(folder: Path, full: bool) -> None:
    """ImageReward.pt, med_config.json and vocab.txt."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    vocabulary = list(dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words()]))
    write_text(folder / "vocab.txt", "\n".join(vocabulary) + "\n")
    size, width, layers = (224, 1024, 24) if full else (64, 64, 2)
    known = 30524 if full else len(vocabulary) + 2  # the original adds [DEC] and [ENC]
    text = {**(_BERT if full else _SMALL_BERT), "vocab_size": known, "max_position_embeddings": 512}
    more = {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "pad_token_id": 0}
    more |= {"attention_probs_dropout_prob": 0.1, "initializer_range": 0.02, "model_type": "bert"}
    more |= {"add_type_embeddings": False, "add_cross_attention": True, "encoder_width": width}
    write_json(folder / "med_config.json", {"architectures": ["BertModel"], **text, **more})
    tensors = filled(blip(size, width, layers, text) | head("mlp.layers.", text["hidden_size"]), 0, torch.float32)
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(tensors, folder / "ImageReward.pt")


def make_faces(folder: Path) -> list[Path]:
    """The files of face-iqa, made by the packages in its environment; none where it is not installed."""
    python = [found.python for found in installed()[0] if found.package == OURS["face-iqa"]]
    if not python:
        print("face-iqa is left out: texforce rewards install face-iqa", file=sys.stderr)
        return []
    subprocess.run([python[0], "-I", Path(__file__).with_name("face_iqa_weights.py"), folder], check=True)
    return [folder / "topiq_nr_cgfiqa_res50.pth", folder / "detection_Resnet50_Final.pth"]


def main() -> None:
    """Make them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true", help="ImageReward and HPSv2 in their official sizes, 6 GB")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    tokenizer = CLIPTokenizer.from_pretrained(tiny.WEIGHTS / "tokenizer")
    make_clip(folder / "clip", tokenizer)
    make_hps(folder / "hpsv2", tokenizer, arguments.full)
    (folder / "aesthetic").mkdir(exist_ok=True)
    torch.save(filled(head("layers.", 48), 0, torch.float32), folder / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth")
    make_image_reward(folder / "image-reward", arguments.full)
    write_text(folder / "scores.csv", f"picture,score\n{picture_hash(np.zeros((64, 64, 3), np.uint8))},1\n")
    faces = make_faces(folder / "face-iqa")
    pickle = {"allow_pickle": "true"}
    commands: dict[str, dict[str, object]] = {
        "clip-score": {"weights": folder / "clip"},
        "pickscore": {"weights": folder / "clip"},
        "aesthetic": {"weights": folder / "aesthetic", "clip": folder / "clip", **pickle},
        "hpsv2": {"weights": folder / "hpsv2", **pickle},
        "hpsv2.1": {"weights": folder / "hpsv2", **pickle},
        "image-reward": {"weights": folder / "image-reward", **pickle},
        **({"face-iqa": {"weights": faces[0], "detector": faces[1], **pickle}} if faces else {}),
        "scores-file": {"path": folder / "scores.csv", "missing": "0"},
    }
    for reward, options in commands.items():
        given = " ".join(f"--reward-option {shlex.quote(f'{reward}.{key}={value}')}" for key, value in options.items())
        print(f"--reward {reward} {given}")


if __name__ == "__main__":
    main()
