"""LoRA on a live pipeline: inserted with peft, its parameters gathered, exported and imported exactly.

LoRA: W' = W + (alpha / r) B A (Hu et al. 2022; sec. 2.2 of the paper).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from texforce_cli.core.seeds import derive
from texforce_cli.errors import TexforceError, first_line
from texforce_cli.quiet import quiet
from texforce_cli.tensorfile import Array

Trained = Literal["text-encoder", "unet", "both"]

_NAME = "texforce"
_OTHER_BASE = "it was made for another base model"
_TARGETS = {
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
}
COMPONENTS: dict[Trained, tuple[str, ...]] = {
    "text-encoder": ("text_encoder",),
    "unet": ("unet",),
    "both": ("text_encoder", "unet"),
}


@dataclass(frozen=True)
class Adapter:
    """A LoRA that is being trained inside `modules` (component name -> the module that holds it)."""

    modules: dict[str, nn.Module]
    rank: int
    alpha: float

    @classmethod
    def insert(cls, pipeline: Any, trained: Trained, *, rank: int, alpha: float, seed: int) -> Adapter:
        """Insert LoRA layers with Gaussian A and zero B, in fp32, the same for the same seed."""
        modules = {name: getattr(pipeline, name) for name in COMPONENTS[trained]}
        for name, module in modules.items():
            config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=_TARGETS[name])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(seed, "lora", name))
                inject_adapter_in_model(config, module, _NAME)
            module.eval()  # no dropout: the ratio of Eq. (5) compares the same network twice
        adapter = cls(modules, rank, alpha)
        for parameter in adapter.parameters():
            parameter.data = parameter.data.float()  # half precision would lose the small steps of Adam
        return adapter

    def layers(self) -> Iterator[tuple[str, LoraLayer]]:
        """The LoRA layers by their name in a LoRA file, e.g. `unet.mid_block...attn2.to_k`, in order."""
        for component, module in self.modules.items():
            # transformers >= 5.6 dropped the level `text_model`; files keep it, for every loader there is
            level = "text_model." if component == "text_encoder" and not hasattr(module, "text_model") else ""
            for name, layer in module.named_modules():
                if isinstance(layer, LoraLayer) and _NAME in layer.lora_A:
                    yield f"{component}.{level}{name}", layer

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer, in order."""
        return [matrix[_NAME].weight for _, layer in self.layers() for matrix in (layer.lora_A, layer.lora_B)]

    def trains(self, component: str) -> bool:
        """Whether `text_encoder` or `unet` is trained."""
        return component in self.modules

    def disabled(self) -> AbstractContextManager[None]:
        """Within this block the pipeline is the reference: the base without the LoRA."""
        return _off([layer for _, layer in self.layers()])

    def state_dict(self) -> dict[str, Tensor]:
        """The raw parameters by name: `<layer>.lora_A`, `<layer>.lora_B`."""
        result = {}
        for name, layer in self.layers():
            result[f"{name}.lora_A"] = layer.lora_A[_NAME].weight.detach().cpu().clone()
            result[f"{name}.lora_B"] = layer.lora_B[_NAME].weight.detach().cpu().clone()
        return result

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters of a `state_dict`."""
        for name, layer in self.layers():
            layer.lora_A[_NAME].weight.data.copy_(state[f"{name}.lora_A"])
            layer.lora_B[_NAME].weight.data.copy_(state[f"{name}.lora_B"])

    def export(self) -> dict[str, Tensor]:
        """The LoRA as a diffusers file has it, fp32, with alpha = rank (the scale is folded into B)."""
        scale = self.alpha / self.rank
        result = {}
        for name, layer in self.layers():
            result[f"{name}.lora_A.weight"] = layer.lora_A[_NAME].weight.detach().cpu().float().clone()
            result[f"{name}.lora_B.weight"] = layer.lora_B[_NAME].weight.detach().cpu().float() * scale
        return result

    def import_(self, weights: Mapping[str, Array], source: str) -> None:
        """Start from a LoRA with alpha = rank, its factors by their keys in diffusers' form; a smaller rank is completed.

        Raises:
            TexforceError: a larger rank, other shapes, or no layer in common.
        """
        scale = self.alpha / self.rank
        left = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]
        present = len(left)
        for name, layer in self.layers():
            if name not in left:
                continue
            a, b = (torch.as_tensor(weights[f"{name}.lora_{factor}.weight"]).flatten(1) for factor in "AB")
            ours_a, ours_b = layer.lora_A[_NAME].weight.data, layer.lora_B[_NAME].weight.data
            rank = a.shape[0]
            if rank > self.rank:
                raise TexforceError(f"'{source}' has rank {rank}, this run has rank {self.rank}", f"use --rank {rank}")
            if a.shape[1] != ours_a.shape[1] or b.shape[0] != ours_b.shape[0]:
                raise TexforceError(
                    f"'{source}' does not fit this model ({name})", "it was made for another base model"
                )
            ours_a[:rank].copy_(a)
            ours_b[:, :rank].copy_(b / scale)
            left.remove(name)
        if len(left) == present:
            raise TexforceError(f"'{source}' holds no layer that is trained here", "check --train and the file")
        if left:
            never = next((name for name in left if not _trainable(name)), None)
            wider = f"no --train has '{never}': " if never else "choose --train so that it has all of them, or "
            raise TexforceError(
                f"{len(left)} of the {present} layers of '{source}' are not trained here",
                f"{wider}draw with it by --lora",
            )


def _trainable(name: str) -> bool:
    """Whether some `--train` has a layer of this name."""
    return name.endswith(tuple(f".{target}" for target in _TARGETS.get(name.partition(".")[0], ())))


def base_model(pipeline: Any) -> AbstractContextManager[None]:
    """Within this block the LoRAs that were put on the pipeline are off."""
    modules = [module for part in (pipeline.unet, pipeline.text_encoder) for module in part.modules()]
    return _off([module for module in modules if isinstance(module, LoraLayer)])


@contextmanager
def _off(layers: Sequence[LoraLayer]) -> Iterator[None]:
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before):
            layer._disable_adapters = disabled


def stack(pipeline: Any, loras: Sequence[tuple[str, Mapping[str, Array]]]) -> None:
    """Put LoRAs (their source's name, their factors by diffusers' keys) on a pipeline, and check that every layer arrived.

    alpha = rank and the weights are in the factors, so that every scale is 1, whatever a loader makes of scales.

    Raises:
        TexforceError: a layer of a LoRA does not exist in this pipeline, or has other shapes.
    """
    names = [f"lora{index}" for index in range(len(loras))]
    for name, (source, arrays) in zip(names, loras):
        weights = _fitted(pipeline, source, arrays)
        try:
            with quiet():  # what matters is checked below
                pipeline.load_lora_weights(weights, adapter_name=name)
        except (RuntimeError, ValueError, KeyError) as error:
            raise TexforceError(f"'{source}' does not fit this model ({first_line(error)})", _OTHER_BASE) from error
    if names:
        pipeline.set_adapters(names, [1.0] * len(names))
    for name, (source, arrays) in zip(names, loras):
        for layer_name in dict.fromkeys(key.rpartition(".lora_")[0] for key in arrays):
            layer = _layer(pipeline, layer_name)
            arrived = isinstance(layer, LoraLayer) and name in layer.lora_A and name in layer.active_adapters
            if not arrived or cast(LoraLayer, layer).scaling[name] != 1:
                raise TexforceError(
                    f"the layer '{layer_name}' of '{source}' did not arrive in the model", "report this as a bug"
                )


def _fitted(pipeline: Any, source: str, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """The factors as tensors of the shapes that the layers want: a 1 x 1 convolution may be stored as a linear layer."""
    fitted = {}
    for key, value in arrays.items():
        array = torch.as_tensor(value)
        name, _, factor = key.rpartition(".lora_")
        layer = _layer(pipeline, name)
        weight = getattr(layer, "weight", None)
        if weight is None:
            raise TexforceError(f"the layer '{name}' of '{source}' does not exist in this model", _OTHER_BASE)
        rank, kernel = array.shape[0 if factor == "A.weight" else 1], tuple(weight.shape[2:])
        if factor == "A.weight":
            wanted = (rank, *weight.shape[1:])
        else:
            wanted = (weight.shape[0], rank, *(1 for _ in kernel))
        if array.numel() != math.prod(wanted) or tuple(array.shape[:2]) != wanted[:2]:
            raise TexforceError(
                f"the layer '{name}' of '{source}' is {list(array.shape)}, this model's is {list(wanted)}", _OTHER_BASE
            )
        fitted[_loadable(key)] = array.reshape(wanted)
    return fitted


def _loadable(key: str) -> str:
    """diffusers knows a text encoder's LoRA without attention layers by its older names alone."""
    if not key.startswith("text_encoder"):
        return key
    return key.replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up.")


def _layer(pipeline: Any, name: str) -> nn.Module | None:
    """The layer that a LoRA names, whatever LoRA is on it already; with and without the level `text_model`."""
    component, _, path = name.partition(".")
    module = getattr(pipeline, component, None)
    for tried in (path, path.removeprefix("text_model.")):
        try:
            return cast(nn.Module, module.get_submodule(tried)) if module is not None else None
        except AttributeError:
            continue
    return None
