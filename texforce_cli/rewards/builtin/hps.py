"""Human Preference Score v2 and v2.1 (Wu et al. 2023), on transformers' CLIP.

The official checkpoints are those of open_clip's ViT-H-14 in half precision; their tensors are renamed for CLIPModel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel
from transformers.initialization import no_init_weights

from texforce_cli.errors import TexforceError
from texforce_cli.rewards.builtin.clip import H14, ClipReward, load_tokenizer
from texforce_cli.rewards.builtin.vision import as_tensor, normalised
from texforce_cli.rewards.weights import Published, Tensors, layers, load_strictly, locate, read_tensors, shape

_REPOSITORY, _REVISION = "xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a"
# SHA-256 of v2.1's file as public tools pin it; of v2.0's the one of the compressed checkpoint in the authors' Space
_V20 = Published(
    _REPOSITORY,
    _REVISION,
    "HPS_v2_compressed.pt",
    "07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1",
)
_V21 = Published(
    _REPOSITORY,
    _REVISION,
    "HPS_v2.1_compressed.pt",
    "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
)
_NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # spelt so in transformers
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


class Fit:
    """The longer side scaled to `size`, the rest black: how HPSv2 reads pictures, as floats that are not clipped."""

    def __init__(self, size: int) -> None:
        self.size = size

    def picture(self, image: Image.Image) -> torch.Tensor:
        """[3, size, size] of a Pillow picture."""
        return self.tensor(as_tensor(image)[None])[0]

    def tensor(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, size, size] of float pictures, with gradient."""
        scale = self.size / max(images.shape[-2:])
        height, width = (round(side * scale) for side in images.shape[-2:])
        if scale != 1:
            images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        around = (left, self.size - width - left, top, self.size - height - top)
        return normalised(F.pad(images, around))


class Hpsv2(ClipReward):
    """Human Preference Score v2: the cosine of a picture and its prompt, about 0.27; the paper prints it times 100.

    Args:
        weights: the file HPS_v2_compressed.pt, or its folder; "" fetches it. Sizes other than ViT-H-14's need
            open_clip's open_clip_config.json beside it.
        tokenizer: folder of CLIP's tokenizer; "" is the folder of `weights` if it holds one, else the Hub.
        device: auto, cpu, cuda or cuda:N.
        batch: pictures at a time.
        allow_pickle: read a pickle whose SHA-256 is not that of the official file.
    """

    name = "hpsv2"
    published = _V20

    def __init__(
        self,
        weights: str = "",
        tokenizer: str = "",
        device: str = "auto",
        batch: int = 16,
        allow_pickle: bool = False,
    ) -> None:
        path = locate(self.published, weights, f"{self.name}.weights")
        tensors = read_tensors(path, self.name, known=self.published.sha256, allow_pickle=allow_pickle)
        config = _config(tensors, path)
        with no_init_weights():  # every weight is in the file, or it is refused
            model = CLIPModel(config)
        load_strictly(model, _renamed(tensors), path)
        words = load_tokenizer(H14, tokenizer, weights, f"{self.name}.tokenizer", config.text_config.vocab_size)
        super().__init__(model, words, Fit(config.vision_config.image_size), device, batch)

    def values(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """[n] cosines."""
        return self.cosines(pixels, prompts)


class Hpsv21(Hpsv2):
    """Human Preference Score v2.1, as v2 with later weights.

    Args:
        weights: the file HPS_v2.1_compressed.pt, or its folder; "" fetches it. Sizes other than ViT-H-14's need
            open_clip's open_clip_config.json beside it.
        tokenizer: folder of CLIP's tokenizer; "" is the folder of `weights` if it holds one, else the Hub.
        device: auto, cpu, cuda or cuda:N.
        batch: pictures at a time.
        allow_pickle: read a pickle whose SHA-256 is not that of the official file.
    """

    name = "hpsv2.1"
    published = _V21


def _config(tensors: Tensors, path: Path) -> CLIPConfig:
    """The architecture: sizes from the tensors, heads from open_clip_config.json, which ViT-H-14 does without."""
    about = path.with_name("open_clip_config.json")
    given: dict[str, Any] = json.loads(about.read_text(encoding="utf-8"))["model_cfg"] if about.is_file() else {}
    width, _, patch, _ = shape(tensors, "visual.conv1.weight", path)
    positions, _ = shape(tensors, "visual.positional_embedding", path)
    words, text_width = shape(tensors, "token_embedding.weight", path)
    if not given and (width, text_width) != (1280, 1024):
        raise TexforceError(
            f"'{path.name}' is not ViT-H-14, and its tensors do not tell its attention heads",
            f"put the model's open_clip_config.json beside it, at '{about}'",
        )
    eyes = {
        "hidden_size": width,
        "intermediate_size": shape(tensors, "visual.transformer.resblocks.0.mlp.c_fc.weight", path)[0],
        "num_hidden_layers": layers(tensors, "visual.transformer.resblocks."),
        "num_attention_heads": width // given.get("vision_cfg", {}).get("head_width", 80),
        "image_size": patch * round((positions - 1) ** 0.5),
        "patch_size": patch,
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": shape(tensors, "transformer.resblocks.0.mlp.c_fc.weight", path)[0],
        "num_hidden_layers": layers(tensors, "transformer.resblocks."),
        "num_attention_heads": given.get("text_cfg", {}).get("heads", 16),
        "vocab_size": words,
        "max_position_embeddings": shape(tensors, "positional_embedding", path)[0],
        "eos_token_id": 2,  # how transformers is told to take the token of the highest number, as open_clip does
        "bos_token_id": None,
    }
    both = {"hidden_act": "gelu"}
    return CLIPConfig(
        vision_config={**eyes, **both},
        text_config={**text, **both},
        projection_dim=shape(tensors, "text_projection", path)[1],
    )


def _renamed(tensors: Tensors) -> Tensors:
    """open_clip's tensors by the names of transformers; projections lie the other way round, q, k and v are one there."""
    result: Tensors = {}
    for name, value in tensors.items():
        new = name
        for pattern, replacement in _NAMES:
            new = re.sub(pattern, replacement, new)
        if name in ("visual.proj", "text_projection"):
            result[new] = value.T
        elif ".attn.in_proj_" in new:
            stem, kind = new.split(".attn.in_proj_")
            for letter, part in zip("qkv", value.chunk(3)):
                result[f"{stem}.self_attn.{letter}_proj.{kind}"] = part
        else:
            result[new] = value
    return result
