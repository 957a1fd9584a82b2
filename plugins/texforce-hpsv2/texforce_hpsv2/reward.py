"""Human Preference Score v2 and v2.1 (Wu et al. 2023), computed by their authors' package hpsv2 1.2.0.

What differs from `hpsv2.score`: the model is loaded once instead of at each call, nothing of LAION's own CLIP is fetched
first, files can be given instead of fetched, pictures are scored in batches, and on a GPU the last product is in single
precision: half precision would round scores to steps of 0.0002.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image

from texforce_hpsv2._loading import (
    Published,
    Tensors,
    WithoutNoise,
    choose_device,
    load_strictly,
    locate,
    read_tensors,
    without_init,
)
from texforce_hpsv2._torchvision import import_torchvision

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
_CONFIG = "open_clip_config.json"
_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_PACKAGE = "hpsv2.src.open_clip"


class HPSv2:
    """Human Preference Score v2: the cosine of a picture and its prompt, about 0.27; the paper prints it times 100.

    Args:
        weights: the file HPS_v2_compressed.pt, or its folder; "" fetches it.
        config: a model configuration of open_clip, for another architecture than ViT-H-14; "" is the file
            open_clip_config.json beside `weights` where there is one, else ViT-H-14.
        device: auto, cpu, cuda or cuda:N.
        batch: pictures at a time.
        allow_pickle: read a pickle whose SHA-256 is not that of the official file.
    """

    name = "hpsv2"
    published = _V20

    def __init__(
        self, weights: str = "", config: str = "", device: str = "auto", batch: int = 16, allow_pickle: bool = False
    ) -> None:
        if batch < 1:
            raise ValueError(f"the option batch is {batch}: give 1 or more")
        self._device, self._batch = choose_device(device), batch
        path = locate(self.published, weights, f"{self.name}.weights")
        self._original = _import_original()
        architecture = _architecture(self._original.configurations, path if weights else None, config, self.name)
        tensors = read_tensors(path, self.published.sha256, allow_pickle, f"{self.name}.allow_pickle")
        self._model = _network(self._original.model, architecture, tensors, path).to(self._device)
        # as the original asks for it: the longer side scaled to the size of the model, the rest black
        self._preprocess = self._original.transform.image_transform(
            self._model.visual.image_size, is_train=False, resize_longest_max=True
        )

    @torch.no_grad()
    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One cosine an image."""
        found: list[float] = []
        context = len(self._model.positional_embedding)
        for i in range(0, len(images), self._batch):
            pixels = torch.stack([self._preprocess(image) for image in images[i : i + self._batch]]).to(self._device)
            words = self._original.tokenizer.tokenize(list(prompts[i : i + self._batch]), context).to(self._device)
            with torch.autocast(self._device.type, torch.float16, enabled=self._device.type == "cuda"):
                seen = self._model(pixels, words)
            found += (seen["image_features"].float() * seen["text_features"].float()).sum(1).tolist()
        return found


class HPSv21(HPSv2):
    """Human Preference Score v2.1, as v2 with later weights.

    Args:
        weights: the file HPS_v2.1_compressed.pt, or its folder; "" fetches it.
        config: a model configuration of open_clip, for another architecture than ViT-H-14; "" is the file
            open_clip_config.json beside `weights` where there is one, else ViT-H-14.
        device: auto, cpu, cuda or cuda:N.
        batch: pictures at a time.
        allow_pickle: read a pickle whose SHA-256 is not that of the official file.
    """

    name = "hpsv2.1"
    published = _V21


@dataclass(frozen=True)
class _Original:
    """The parts of the package that a score needs."""

    model: ModuleType
    transform: ModuleType
    tokenizer: ModuleType
    configurations: Path


def _import_original() -> _Original:
    """hpsv2's model, preprocessing and tokenizer; its factory needs tkinter, and its clients clint and requests."""
    import_torchvision()
    with warnings.catch_warnings(), without_init("hpsv2", "hpsv2.src", _PACKAGE):
        model = importlib.import_module(f"{_PACKAGE}.model")
        transform = importlib.import_module(f"{_PACKAGE}.transform")
    source = Path(str(model.__file__)).with_name("tokenizer.py")
    return _Original(model, transform, _tokenizer(source), source.with_name("model_configs"))


def _tokenizer(source: Path) -> ModuleType:
    """The package's tokenizer, which reads a vocabulary from its own folder that the wheel 1.2.0 lacks.

    It is told that it lies in the folder of open_clip, whose wheel holds the same file; open_clip itself is not imported.
    """
    name = f"{_PACKAGE}.tokenizer"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.find_spec("open_clip")
    folders = [source.parent, *(Path(folder) for folder in (found and found.submodule_search_locations) or ())]
    folder = next((folder for folder in folders if (folder / _VOCABULARY).is_file()), None)
    if folder is None:
        raise FileNotFoundError(
            f"'{_VOCABULARY}' lies neither in hpsv2 nor in open_clip: install the package open_clip_torch"
        )
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(folder / source.name)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def _architecture(configurations: Path, weights: Path | None, given: str, name: str) -> dict[str, Any]:
    """The arguments of open_clip's CLIP class, from the file `given`, the one beside `weights`, or ViT-H-14's."""
    path = Path(given).expanduser() if given else configurations / "ViT-H-14.json"
    if not given and weights is not None and weights.with_name(_CONFIG).is_file():
        path = weights.with_name(_CONFIG)
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileNotFoundError(
            f"there is no file '{path}': {name}.config wants a model configuration of open_clip"
        ) from error
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON ({error}): {name}.config wants a configuration of open_clip") from error
    parts = loaded.get("model_cfg", loaded) if isinstance(loaded, dict) else {}
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(parts):
        raise ValueError(f"'{path}' lacks embed_dim, vision_cfg or text_cfg: give a model configuration of open_clip")
    return dict(parts)


def _network(original: ModuleType, architecture: Mapping[str, Any], tensors: Tensors, path: Path) -> Any:
    """The package's CLIP of that architecture with the weights in it, ready to score."""
    try:
        with WithoutNoise():
            model = original.CLIP(**architecture, output_dict=True)
    except (TypeError, ValueError, ZeroDivisionError, AssertionError) as error:
        raise ValueError(f"hpsv2 can make no CLIP of this configuration: {error}") from error
    load_strictly(model, tensors, path)
    known = model.token_embedding.num_embeddings
    if known < _listed():
        raise ValueError(
            f"'{path}' knows {known} words and hpsv2's vocabulary has {_listed()}: the original backend reads only "
            "checkpoints of CLIP's own vocabulary"
        )
    return model.requires_grad_(False).eval()


def _listed() -> int:
    return int(sys.modules[f"{_PACKAGE}.tokenizer"]._tokenizer.vocab_size)
