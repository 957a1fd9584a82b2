"""ImageReward (Xu et al. 2023), on transformers' BLIP: the official checkpoint, its tensors renamed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from transformers.initialization import no_init_weights

from texforce_cli.errors import TexforceError
from texforce_cli.rewards.builtin.vision import Crop, Head, PictureReward
from texforce_cli.rewards.weights import Published, Tensors, layers, load_strictly, locate, read_tensors, shape

_OFFICIAL = Published(
    "THUDM/ImageReward",
    "5736be03b2652728fb87788c9797b0570450ab72",
    "ImageReward.pt",
    "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
)
_BERT = Published("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594", "vocab.txt")
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the scores of the authors' validation set
_WORDS = 35
_HEAD_WIDTH = 64
_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)
_EYES, _READER, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
# in the official file, and no part of the score
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class ImageReward(PictureReward):
    """ImageReward: what people would prefer, with mean 0 and deviation 1 over the authors' validation set.

    Args:
        weights: the file ImageReward.pt, or its folder; "" fetches it. A med_config.json beside it is obeyed.
        tokenizer: BERT's vocab.txt, or its folder; "" is that beside `weights`, else bert-base-uncased from the Hub.
        device: auto, cpu, cuda or cuda:N.
        batch: pictures at a time.
        allow_pickle: read a pickle whose SHA-256 is not that of the official file.
    """

    def __init__(
        self, weights: str = "", tokenizer: str = "", device: str = "auto", batch: int = 16, allow_pickle: bool = False
    ) -> None:
        path = locate(_OFFICIAL, weights, "image-reward.weights")
        tensors = read_tensors(path, "image-reward", known=_OFFICIAL.sha256, allow_pickle=allow_pickle)
        parts = _parts(tensors, path)
        eyes = _eyes(parts[_EYES], path)
        super().__init__(Crop(eyes.config.image_size), device, batch)
        self._eyes = self._frozen(eyes)
        self._reader = self._frozen(_reader(parts[_READER], eyes.config.hidden_size, path))
        head = Head(parts[_HEAD])
        load_strictly(head, parts[_HEAD], path)
        self._head = self._frozen(head)
        self._tokenizer = _tokenizer(path, weights, tokenizer, self._reader.config.vocab_size)

    def values(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """[n] of any size; the first token has read the picture through cross-attention."""
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_WORDS, return_tensors="pt"
        ).to(self._device)
        read = self._reader(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=self._eyes(pixels).last_hidden_state,
            is_decoder=False,  # no causal mask: only the cross-attention of a decoder is wanted
        )
        scores: torch.Tensor = (self._head(read.last_hidden_state[:, 0]) - _MEAN) / _STD
        return scores


def _parts(tensors: Tensors, path: Path) -> dict[str, Tensors]:
    """The tensors of the three networks, each by the names within it."""
    parts: dict[str, Tensors] = {_EYES: {}, _READER: {}, _HEAD: {}}
    for name, value in tensors.items():
        if name.startswith(_UNUSED):
            continue
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if prefix is None:
            raise TexforceError(f"'{path.name}' does not fit ImageReward: unexpected {name}", "get the official file")
        parts[prefix][name.removeprefix(prefix)] = value
    return parts


def _eyes(tensors: Tensors, path: Path) -> BlipVisionModel:
    width, _, patch, _ = shape(tensors, "patch_embed.proj.weight", path)
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shape(tensors, "blocks.0.mlp.fc1.weight", path)[0],
        num_hidden_layers=layers(tensors, "blocks."),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=patch * round((shape(tensors, "pos_embed", path)[1] - 1) ** 0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    with no_init_weights():
        network = BlipVisionModel(config)
    load_strictly(network, {_new_name(name): value for name, value in tensors.items()}, path)
    return network


def _new_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _reader(tensors: Tensors, picture_width: int, path: Path) -> BlipTextModel:
    about = path.with_name("med_config.json")
    given = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    words, width = shape(tensors, "embeddings.word_embeddings.weight", path)
    config = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=picture_width,
        intermediate_size=shape(tensors, "encoder.layer.0.intermediate.dense.weight", path)[0],
        num_hidden_layers=layers(tensors, "encoder.layer."),
        num_attention_heads=given.get("num_attention_heads", width // _HEAD_WIDTH),
        max_position_embeddings=shape(tensors, "embeddings.position_embeddings.weight", path)[0],
        hidden_act=given.get("hidden_act", "gelu"),
        layer_norm_eps=given.get("layer_norm_eps", 1e-12),
        is_decoder=True,  # what gives it its cross-attention
        bos_token_id=None,
    )
    with no_init_weights():
        network = BlipTextModel(config, add_pooling_layer=False)
    load_strictly(network, tensors, path)
    return network


def _tokenizer(path: Path, weights: str, given: str, words: int) -> BertTokenizer:
    beside = str(path.parent) if weights and path.with_name("vocab.txt").is_file() else ""
    file = locate(_BERT, given or beside, "image-reward.tokenizer")
    listed = {word: i for i, word in enumerate(file.read_text(encoding="utf-8").rstrip("\n").split("\n"))}
    if len(listed) > words:
        raise TexforceError(
            f"'{file.name}' lists {len(listed)} words, and the model knows {words}",
            "give the vocabulary that belongs to it with --reward-option image-reward.tokenizer=FILE",
        )
    return BertTokenizer(vocab=listed)
