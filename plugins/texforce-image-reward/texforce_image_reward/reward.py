"""ImageReward (Xu et al. 2023), computed by its authors' package image-reward 1.5.

What differs from `ImageReward.load`: the checkpoint is loaded strictly and without running code of the file, the network is
made in the sizes of the checkpoint, files can be given instead of fetched, and pictures are scored in batches.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image

from texforce_image_reward._loading import (
    Published,
    Tensors,
    WithoutNoise,
    choose_device,
    load_strictly,
    locate,
    read_tensors,
    without_init,
)
from texforce_image_reward._torchvision import import_torchvision

_REPOSITORY, _REVISION = "THUDM/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72"
_WEIGHTS = Published(
    _REPOSITORY,
    _REVISION,
    "ImageReward.pt",
    "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",  # of the file's Git LFS pointer
)
_MED_CONFIG = Published(_REPOSITORY, _REVISION, "med_config.json")
_VOCABULARY = Published("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594", "vocab.txt")
_WORDS = 35  # the original cuts every prompt there
_HEAD_WIDTH = 64  # of both vision transformers that the original knows
_VIT_L = (224, {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16})


class ImageReward:
    """ImageReward: what people would prefer, with mean 0 and deviation 1 over the authors' validation set.

    Args:
        weights: the file ImageReward.pt, or its folder; "" fetches it.
        med_config: the file med_config.json, or its folder; "" is the one beside `weights`, else it is fetched.
        tokenizer: BERT's vocab.txt, or its folder; "" is the one beside `weights`, else bert-base-uncased's is fetched.
        device: auto, cpu, cuda or cuda:N.
        batch: pictures at a time.
        allow_pickle: read a pickle whose SHA-256 is not that of the official file.
    """

    def __init__(
        self,
        weights: str = "",
        med_config: str = "",
        tokenizer: str = "",
        device: str = "auto",
        batch: int = 16,
        allow_pickle: bool = False,
    ) -> None:
        if batch < 1:
            raise ValueError(f"the option batch is {batch}: give 1 or more")
        self._device, self._batch = choose_device(device), batch
        path = locate(_WEIGHTS, weights, "image-reward.weights")
        config = locate(_MED_CONFIG, med_config or _beside(path, weights, _MED_CONFIG), "image-reward.med_config")
        words = locate(_VOCABULARY, tokenizer or _beside(path, weights, _VOCABULARY), "image-reward.tokenizer")
        tensors = read_tensors(path, _WEIGHTS.sha256, allow_pickle, "image-reward.allow_pickle")
        self._model = _network(tensors, path, config, words, str(self._device))

    @torch.no_grad()
    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One number an image, of any size; most lie between -2 and 2."""
        found: list[float] = []
        for i in range(0, len(images), self._batch):
            pixels = torch.stack([self._model.preprocess(image) for image in images[i : i + self._batch]])
            tokens = self._model.blip.tokenizer(
                list(prompts[i : i + self._batch]),
                padding="max_length",
                truncation=True,
                max_length=_WORDS,
                return_tensors="pt",
            ).to(self._device)
            rewards = self._model.score_gard(tokens.input_ids, tokens.attention_mask, pixels.to(self._device))
            found += rewards[:, 0].tolist()
        return found


def _beside(path: Path, weights: str, published: Published) -> str:
    """The folder of the weights where the user gave them and the file lies beside them, else ""."""
    return str(path.parent) if weights and path.with_name(published.file).is_file() else ""


def _network(tensors: Tensors, path: Path, med_config: Path, vocabulary: Path, device: str) -> Any:
    """The original's model with the weights in it, ready to score on `device`."""
    original = _import_original()
    size, shapes = _vision(tensors, path)
    reader_width = len(tensors["mlp.layers.0.weight"][0]) if "mlp.layers.0.weight" in tensors else 768
    stand_ins: dict[str, Any] = {"BertTokenizer": _Vocabulary(vocabulary)}
    if (size, shapes) != _VIT_L:
        stand_ins["create_vit"] = _Vit(size, shapes)
    with _instead(stand_ins), WithoutNoise():
        model = original.ImageReward(device=device, med_config=str(med_config))
        model.mlp = original.MLP(reader_width)
    model.preprocess = original._transform(size)
    load_strictly(model, tensors, path)
    known, listed = model.blip.text_encoder.config.vocab_size, len(model.blip.tokenizer)
    if listed > known:
        raise ValueError(
            f"'{vocabulary}' makes a vocabulary of {listed} words and the model knows {known}: give the one that belongs "
            "to it with image-reward.tokenizer=FILE"
        )
    return model.requires_grad_(False).eval().to(device)


def _import_original() -> ModuleType:
    """The module of the original's model, without its training code, which needs diffusers, datasets and more."""
    import_torchvision()
    with warnings.catch_warnings(), without_init("ImageReward", "ImageReward.models"):  # it would silence all warnings
        return importlib.import_module("ImageReward.ImageReward")


def _vision(tensors: Tensors, path: Path) -> tuple[int, dict[str, int]]:
    """The side of the pictures, and the sizes of the vision transformer as its class has them."""
    prefix = "blip.visual_encoder."
    try:
        width, _, patch, _ = tensors[f"{prefix}patch_embed.proj.weight"].shape
        positions = tensors[f"{prefix}pos_embed"].shape[1] - 1
    except (KeyError, ValueError) as error:
        raise ValueError(f"'{path}' holds no vision transformer of BLIP: get the official file") from error
    size = patch * round(positions**0.5)
    blocks = {name.split(".")[3] for name in tensors if name.startswith(f"{prefix}blocks.")}
    return size, {"patch_size": patch, "embed_dim": width, "depth": len(blocks), "num_heads": width // _HEAD_WIDTH}


@contextlib.contextmanager
def _instead(stand_ins: Mapping[str, Any]) -> Iterator[None]:
    """Within it, names that the original's BLIP looks up mean something else: its constructor has no arguments for them."""
    modules = [sys.modules[f"ImageReward.models.BLIP.{name}"] for name in ("blip", "blip_pretrain")]
    before = [
        (module, name, getattr(module, name)) for module in modules for name in stand_ins if hasattr(module, name)
    ]
    try:
        for module, name, _ in before:
            setattr(module, name, stand_ins[name])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class _Vocabulary:
    """Stands in for BertTokenizer in the original's `init_tokenizer`, which asks the Hub for bert-base-uncased by name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def from_pretrained(self, name: str) -> Any:
        """A tokenizer of the vocabulary on disk, whatever the name; like that of bert-base-uncased it lowers the case."""
        from transformers import BertTokenizer

        return BertTokenizer(str(self.path), do_lower_case=True)


class _Vit:
    """Stands in for the original's `create_vit`, which knows ViT-B and ViT-L alone; the class it makes is the same."""

    def __init__(self, size: int, shapes: Mapping[str, int]) -> None:
        self.size, self.shapes = size, shapes

    def __call__(self, *_: Any) -> tuple[torch.nn.Module, int]:
        """The vision transformer, and its width."""
        transformer = sys.modules["ImageReward.models.BLIP.vit"].VisionTransformer
        return transformer(img_size=self.size, **self.shapes), self.shapes["embed_dim"]
