"""One-file checkpoints in the original Stable Diffusion layout: what is in them, and a pipeline from them.

The file's header tells SD 1.x from SD 2.x, and one of its weights what SD 2.x predicts; the configs come from a folder beside
the file or from this package. Nothing is fetched.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from texforce_cli.errors import TexforceError
from texforce_cli.tensorfile import TensorFile

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

Prediction = Literal["epsilon", "v_prediction"]

CONFIGS = Path(__file__).parent / "configs"
"""diffusers' config folders `sd1` and `sd2`, and CLIP's vocabulary."""

_UNET = "model.diffusion_model."
_TEXT_ENCODERS = (
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "cond_stage_model.model.token_embedding.weight",
)
_TELLING_BIAS = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_TELLING_SPREAD = 0.09
"""The standard deviation of that bias of SD 2.x above which it predicts v, as ComfyUI tells them apart (`SD20.model_type` in
comfy/supported_models.py)."""
_GENERATIONS = {768: 1, 1024: 2}
_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}


@dataclass(frozen=True)
class Checkpoint:
    """A whole SD 1.x or 2.x checkpoint.

    `config` is the diffusers config folder that fits; `generation` (1 or 2) and `prediction` are known where that folder
    is the package's own, None where the user's decides. `note` says how the file is read.
    """

    path: Path
    config: Path
    note: str
    generation: int | None = None
    prediction: Prediction | None = None

    @property
    def sample_size(self) -> int | None:
        """The side of its latents where `config` does not have the last word: SD 2.x was published at 768 pixels with
        v_prediction, at 512 with epsilon."""
        return (96 if self.prediction == "v_prediction" else 64) if self.generation == 2 else None


def inspect(path: Path) -> Checkpoint:
    """What a file is, by its header and, where that does not tell what it predicts, one tensor.

    Raises:
        TexforceError: no whole SD 1.x or 2.x checkpoint; the sentence says what it is instead.
    """
    try:
        file = TensorFile.open(path)
    except TexforceError as error:  # no path of this machine in a run's record
        raise type(error)(error.message.replace(str(path), path.name), error.hint) from error
    shapes = {key: entry.shape for key, entry in file.entries.items()}
    width = next((shape[-1] for key, shape in shapes.items() if key.startswith(_UNET) and ".attn2.to_k." in key), None)
    _refuse_others(path.name, shapes, width)
    beside = path.with_suffix("")
    if (beside / "model_index.json").is_file():
        return Checkpoint(path, beside, f"with the config folder '{beside.name}' beside it")
    if width not in _GENERATIONS:
        raise TexforceError(
            f"'{path.name}' has cross-attention of width {width}, SD 1.x has 768 and SD 2.x 1024",
            f"put its diffusers config folder '{beside.name}' beside it",
        )
    generation = _GENERATIONS[width]
    prediction, how = _prediction(file, generation)
    otherwise = f" {how}, a config folder '{beside.name}' beside it decides otherwise" if how else ""
    note = f"an SD {generation}.x checkpoint, {prediction}{otherwise}"
    return Checkpoint(path, CONFIGS / f"sd{generation}", note, generation, prediction)


def load(checkpoint: Checkpoint, **arguments: Any) -> StableDiffusionPipeline:
    """The pipeline of a checkpoint, without a network. `arguments` go to diffusers' `from_single_file`."""
    from diffusers import StableDiffusionPipeline

    if checkpoint.generation:
        arguments["tokenizer"] = clip_tokenizer(checkpoint.generation)
    pipeline = StableDiffusionPipeline.from_single_file(
        str(checkpoint.path), config=str(checkpoint.config), local_files_only=True, **arguments
    )
    if checkpoint.prediction:
        pipeline.scheduler.register_to_config(prediction_type=checkpoint.prediction)
    if checkpoint.sample_size:
        pipeline.unet.register_to_config(sample_size=checkpoint.sample_size)
    return pipeline


def clip_tokenizer(generation: int) -> CLIPTokenizer:
    """The tokenizer of SD 1.x or 2.x, built from CLIP's vocabulary. They differ in the padding: SD 2.x has '!', id 0."""
    from transformers import CLIPTokenizer

    lines = gzip.decompress((CONFIGS / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8").split("\n")
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    special = ["<|startoftext|>", "<|endoftext|>"]
    size = 49408 - 2 * len(symbols) - len(special)
    merges = [tuple(line.split()) for line in lines[1 : size + 1]]  # the first line is a version, the tail was not used
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), *special]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        pad_token="!" if generation == 2 else "<|endoftext|>",
        model_max_length=77,
    )


def _refuse_others(name: str, shapes: Mapping[str, tuple[int, ...]], width: int | None) -> None:
    whole = "give a whole SD 1.x or 2.x checkpoint, or the folder of a diffusers model"
    if not any(key.startswith(_UNET) for key in shapes):
        if any("lora" in key.lower() or key.startswith("lycoris_") for key in shapes):
            raise TexforceError(
                f"'{name}' is a LoRA, not a model", "name its base with --model and the LoRA with --lora or --init-lora"
            )
        raise TexforceError(f"'{name}' is no Stable Diffusion checkpoint (nothing in it begins with '{_UNET}')", whole)
    if width == 2048 or any(key.startswith("conditioner.embedders.1.") for key in shapes):
        raise TexforceError(f"'{name}' is SDXL, which cannot be trained yet", "give an SD 1.x or 2.x checkpoint")
    if width is None:
        raise TexforceError(f"'{name}' is of another family than Stable Diffusion 1.x and 2.x", whole)
    if shapes.get(f"{_UNET}input_blocks.0.0.weight", (0, 0))[1] == 9:
        raise TexforceError(f"'{name}' is an inpainting model, which cannot be trained", whole)
    if not any(key in shapes for key in _TEXT_ENCODERS):
        raise TexforceError(f"'{name}' holds no text encoder that can be read", whole)
    if not any(key.startswith(("first_stage_model.", "vae.")) for key in shapes):
        raise TexforceError(f"'{name}' holds no VAE", whole)


def _prediction(file: TensorFile, generation: int) -> tuple[Prediction, str]:
    """What the U-Net predicts, and how that is known where the header does not tell it."""
    told = file.metadata.get("modelspec.prediction_type", "").lower()
    architecture = file.metadata.get("modelspec.architecture", "").lower()
    if told in _PREDICTIONS:
        return _PREDICTIONS[told], ""
    if "v_pred" in file.entries or architecture == "stable-diffusion-v2-768-v":
        return "v_prediction", ""
    if generation == 1 or architecture == "stable-diffusion-v2-512":
        return "epsilon", ""
    if _TELLING_BIAS not in file.entries:
        return "v_prediction", "assumed"
    spread = file.read(_TELLING_BIAS).astype(float).std()
    return "v_prediction" if spread > _TELLING_SPREAD else "epsilon", "by one of its weights"
