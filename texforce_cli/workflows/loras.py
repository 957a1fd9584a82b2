"""LoRAs as the commands that draw and train use them: named with a weight, read whole, the weight in the factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from texforce_cli.diffusion.models import replace_weights
from texforce_cli.errors import TexforceError
from texforce_cli.lora.full import OPEN_CLIP, FullWeights, open_full
from texforce_cli.lora.header import told
from texforce_cli.lora.lora import Lora
from texforce_cli.lora.read import read_lora
from texforce_cli.lora.spec import LoraSpec, parse_lora
from texforce_cli.tensorfile import Array


@dataclass(frozen=True)
class LoadedLora:
    """A LoRA in memory: `arrays` by their keys in diffusers' form, alpha = rank, scale and weight folded into B."""

    spec: LoraSpec
    lora: Lora
    arrays: Mapping[str, Array]

    @property
    def trained(self) -> dict[str, Any]:
        """What texforce wrote into it about its training; {} for other LoRAs and for nonsense."""
        return told(self.lora.metadata, "texforce")

    @property
    def warnings(self) -> list[str]:
        """What may be wrong with it, or with its weights."""
        lora, idle = self.lora, self.spec.idle(self.lora.components)
        unused = f"'{lora.source}' has no component for {', '.join(idle)}; it has {', '.join(lora.components)}"
        return [*lora.warnings, *([unused] if idle else [])]

    @property
    def about(self) -> dict[str, Any]:
        """What a picture's record says of it: file names, hashes, weights; no path of this machine."""
        names, hashes = [file.name for file in self.lora.files], self.lora.sha256()
        one = len(names) == 1
        return {
            "file": names[0] if one else names,
            "weight": dict(self.spec.parts) or self.spec.weight,
            "sha256": hashes[0] if one else hashes,
        }


def load_lora(text: str, *, allow_pickle: bool = False) -> LoadedLora:
    """Read `SOURCE[:WEIGHT]`.

    Raises:
        UsageError, TexforceError: as `parse_lora` and `read_lora`; NaN or infinite values.
    """
    found = open_lora(text, allow_pickle=allow_pickle)
    return replace(found, arrays=found.lora.arrays(found.spec.weight_of))


def open_lora(text: str, *, allow_pickle: bool = False) -> LoadedLora:
    """As `load_lora`, from the header alone: without `arrays`.

    Raises:
        UsageError, TexforceError: as `parse_lora` and `read_lora`.
    """
    spec = parse_lora(text)
    return LoadedLora(spec, read_lora(spec.source, allow_pickle=allow_pickle), {})


def training_of(text: str, *, allow_pickle: bool = False) -> dict[str, Any]:
    """As `LoadedLora.trained`, from the header alone.

    Raises:
        UsageError, TexforceError: as `read_lora`.
    """
    return open_lora(text, allow_pickle=allow_pickle).trained


def trained_on(text: str, *, allow_pickle: bool = False) -> set[str]:
    """The rewards that a LoRA, or what it was fused from, was trained on, by its header; empty where nothing tells.

    Raises:
        UsageError, TexforceError: as `read_lora`.
    """
    metadata = open_lora(text, allow_pickle=allow_pickle).lora.metadata
    return rewards_in([told(metadata, "texforce"), told(metadata, "texforce.fuse")])


def rewards_in(about: Any) -> set[str]:
    """The rewards that headers, or what stands anywhere within one, name."""
    found: set[str] = set()
    headers = [about]
    while headers:
        about = headers.pop()
        if isinstance(about, list):
            headers += about
        elif isinstance(about, dict):
            rewards = about.get("rewards", [])
            found |= {str(reward).partition(":")[0] for reward in rewards} if isinstance(rewards, list) else set()
            headers += [value for value in about.values() if isinstance(value, dict | list)]
    return found


def put_weights(pipeline: Any, component: str, source: str, *, allow_pickle: bool = False) -> None:
    """Give the U-Net or text encoder of a pipeline the weights of a folder or file.

    Raises:
        UsageError, TexforceError: as `open_full`; weights of another kind of model, or not whole.
    """
    weights = weights_of(component, source, allow_pickle=allow_pickle)
    own = [name for name in weights.places if name.startswith(f"{component}.")]
    replace_weights(pipeline, component, source, own, weights.read)


def hashes_of(replaced: Mapping[str, str], *, allow_pickle: bool = False) -> dict[str, list[str]]:
    """What a picture's record says of whole weights, by component: the hash of each file.

    Raises:
        UsageError, TexforceError: as `weights_of`.
    """
    return {name: weights_of(name, source, allow_pickle=allow_pickle).sha256() for name, source in replaced.items()}


def weights_of(component: str, source: str, *, allow_pickle: bool = False) -> FullWeights:
    """What a folder or file holds of the U-Net or text encoder; nothing is read but names.

    Raises:
        UsageError, TexforceError: as `open_full`; it holds none of them.
    """
    weights = open_full(source, allow_pickle=allow_pickle)
    if component not in weights.components:
        cut_otherwise = component == "text_encoder" and OPEN_CLIP in weights.elsewhere
        raise TexforceError(
            f"'{source}' holds no {component}, but {', '.join(weights.components)}",
            "SD 2.x stores OpenCLIP's there: convert it to a diffusers folder" if cut_otherwise else "check the file",
        )
    return weights
