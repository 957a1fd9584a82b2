"""CLIPScore, PickScore and the LAION aesthetic score, on transformers' CLIP."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.initialization import no_init_weights

from texforce_cli.errors import TexforceError
from texforce_cli.files import user_path
from texforce_cli.rewards.builtin.vision import MEAN, STD, Crop, Head, PictureReward, Reading
from texforce_cli.rewards.weights import Published, load_strictly, locate, read_tensors, shape

H14 = Published("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c", "vocab.json")
"""Where PickScore and HPSv2 have their tokenizer from."""
_B32 = Published(
    "openai/clip-vit-base-patch32",
    "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
    "pytorch_model.bin",
    "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f",
)
_L14 = Published("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", "model.safetensors")
_PICKSCORE = Published("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800", "model.safetensors")
_AESTHETIC = Published(
    "camenduru/improved-aesthetic-predictor",  # a copy on the Hub; the digest is that of the original on GitHub
    "main",
    "sac+logos+ava1-l14-linearMSE.pth",
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)


class ClipReward(PictureReward):
    """A reward on the embeddings of a CLIP model; without a tokenizer, on those of pictures alone."""

    def __init__(
        self, model: CLIPModel, tokenizer: CLIPTokenizer | None, reading: Reading, device: str, batch: int
    ) -> None:
        super().__init__(reading, device, batch)
        self._model = self._frozen(model)
        self._tokenizer = tokenizer

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unit vectors [n, d]."""
        return F.normalize(self._model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [n, d], each distinct prompt read once; what is longer than the model's context is cut."""
        assert self._tokenizer is not None
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(distinct), padding=True, truncation=True, max_length=length, return_tensors="pt")
        # no attention mask: the text model is causal, and nothing after the end of a prompt is looked at
        read = self._model.get_text_features(input_ids=tokens.input_ids.to(self._device)).pooler_output
        return F.normalize(read, dim=-1)[[distinct[prompt] for prompt in prompts]]

    def cosines(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """[n] between each picture and its prompt."""
        return (self.embed_images(pixels) * self.embed_prompts(prompts)).sum(-1)


class ClipScore(ClipReward):
    """CLIPScore: 2.5 * max(cosine, 0) with "A photo depicts" before the prompt (Hessel et al. 2021, eq. 1).

    As published: CLIP ViT-B/32, the weight 2.5 and the prefix. Other software multiplies by 100 and has no prefix.

    Args:
        weights: folder of a CLIP model as transformers saves it, with its tokenizer; "" is openai/clip-vit-base-patch32.
        prefix: what stands before each prompt.
        device: auto, cpu, cuda or cuda:N.
        batch: pictures at a time.
        allow_pickle: read a pickle whose SHA-256 is not that of the official file.
    """

    def __init__(
        self,
        weights: str = "",
        prefix: str = "A photo depicts",
        device: str = "auto",
        batch: int = 16,
        allow_pickle: bool = False,
    ) -> None:
        model, reading = load_clip(_B32, weights, "clip-score.weights", allow_pickle)
        words = load_tokenizer(_B32, "", weights, "clip-score.weights", model.config.text_config.vocab_size)
        super().__init__(model, words, reading, device, batch)
        self._prefix = f"{prefix.strip()} " if prefix.strip() else ""

    def values(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """[n] between 0 and 2.5."""
        return 2.5 * self.cosines(pixels, [self._prefix + prompt for prompt in prompts]).clamp(min=0)


class PickScore(ClipReward):
    """PickScore: the cosine times the model's logit scale (Kirstain et al. 2023), about 20 for a fitting picture.

    Args:
        weights: folder of the model as transformers saves it; "" is yuvalkirstain/PickScore_v1.
        tokenizer: folder of the tokenizer; "" is that of `weights`, or else laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
        device: auto, cpu, cuda or cuda:N.
        batch: pictures at a time.
        allow_pickle: read a pickle whose SHA-256 is not that of the official file.
    """

    def __init__(
        self,
        weights: str = "",
        tokenizer: str = "",
        device: str = "auto",
        batch: int = 16,
        allow_pickle: bool = False,
    ) -> None:
        model, reading = load_clip(_PICKSCORE, weights, "pickscore.weights", allow_pickle)
        words = load_tokenizer(H14, tokenizer, weights, "pickscore.tokenizer", model.config.text_config.vocab_size)
        super().__init__(model, words, reading, device, batch)

    def values(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """[n] logits."""
        return self._model.logit_scale.exp() * self.cosines(pixels, prompts)


class Aesthetic(ClipReward):
    """The LAION aesthetic score of a picture, about 1 to 10, whatever its prompt (Schuhmann 2022).

    Args:
        weights: the file sac+logos+ava1-l14-linearMSE.pth, or its folder; "" fetches it.
        clip: folder of the CLIP model that it sits on, as transformers saves it; "" is openai/clip-vit-large-patch14.
        device: auto, cpu, cuda or cuda:N.
        batch: pictures at a time.
        allow_pickle: read a pickle whose SHA-256 is not that of the official file.
    """

    def __init__(
        self, weights: str = "", clip: str = "", device: str = "auto", batch: int = 16, allow_pickle: bool = False
    ) -> None:
        path = locate(_AESTHETIC, weights, "aesthetic.weights")
        tensors = read_tensors(path, "aesthetic", known=_AESTHETIC.sha256, allow_pickle=allow_pickle)
        width = shape(tensors, "layers.0.weight", path)[1]
        head = Head(tensors)
        load_strictly(head, tensors, path)
        model, reading = load_clip(_L14, clip, "aesthetic.clip", allow_pickle)
        if model.config.projection_dim != width:
            raise TexforceError(
                f"'{path.name}' sits on embeddings of {width} numbers, and this CLIP makes {model.config.projection_dim}",
                "give the CLIP model that belongs to it with --reward-option aesthetic.clip=FOLDER",
            )
        super().__init__(model, None, reading, device, batch)
        self._head = self._frozen(head)

    def values(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """[n], of the pictures alone."""
        scores: torch.Tensor = self._head(self.embed_images(pixels))
        return scores


def load_clip(published: Published, given: str, option: str, allow_pickle: bool) -> tuple[CLIPModel, Crop]:
    """The CLIP model of a repository, or of the folder `given`, strictly; and how it reads pictures."""
    safe = published.sibling("model.safetensors")
    path = locate(safe if given and (user_path(given) / safe.file).is_file() else published, given, option)
    settings = locate(published.sibling("config.json"), str(path.parent) if given else "", option)
    reward = option.rpartition(".")[0]
    tensors = read_tensors(path, reward, known=published.sha256, allow_pickle=allow_pickle)
    with no_init_weights():  # every weight is in the file, or it is refused
        model = CLIPModel(CLIPConfig.from_dict(json.loads(settings.read_text(encoding="utf-8")))).float()
    # older versions of transformers saved their table of positions, 0, 1, 2, ...
    load_strictly(model, {name: t for name, t in tensors.items() if not name.endswith(".position_ids")}, path)
    about = settings.with_name("preprocessor_config.json")
    colours = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    mean, std = colours.get("image_mean", MEAN), colours.get("image_std", STD)
    return model, Crop(model.config.vision_config.image_size, mean, std)


def load_tokenizer(published: Published, given: str, weights: str, option: str, vocabulary: int) -> CLIPTokenizer:
    """CLIP's tokenizer of the folder `given`; without one that of the folder of `weights`, or else of the repository.

    Raises:
        TexforceError: it is not there, or knows more than the `vocabulary` words of the model.
    """
    beside = user_path(weights)
    folder = user_path(given) if given else beside.parent if beside.is_file() else beside
    if not (given or weights) or not (folder / "tokenizer.json").is_file():
        there = given or (str(folder) if weights and (folder / "vocab.json").is_file() else "")
        for file in ("merges.txt", "vocab.json"):
            folder = locate(published.sibling(file), there, option).parent
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    if len(tokenizer) > vocabulary:
        raise TexforceError(
            f"the tokenizer in '{folder}' knows {len(tokenizer)} words, and the model {vocabulary}",
            f"give the tokenizer that belongs to it with --reward-option {option}=FOLDER",
        )
    return tokenizer
