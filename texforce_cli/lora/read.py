"""Every format of LoRA read into the one form: `read_lora` finds the file, tells its format, and refuses what is none."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from texforce_cli.errors import TexforceError, UsageError, first_line
from texforce_cli.files import user_path
from texforce_cli.lora.header import told
from texforce_cli.lora.lora import Lora, LoraModule, Tensors, bases_of, of_second_encoder
from texforce_cli.lora.names import COMPONENTS, REFUSED, Place, is_convolution, locate, parse_key
from texforce_cli.lora.pickles import read_pickle
from texforce_cli.tensorfile import Entry, TensorFile, shown

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER_METADATA = "lora_adapter_metadata"
"""Where the header of diffusers' form has what PEFT's config says."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FILES = (FILE_NAME, f"adapter/{FILE_NAME}", PEFT_NAME, "pytorch_lora_weights.bin", "adapter_model.bin")
_FULL = (
    "it holds whole weights, not a LoRA: use it with --unet or --text-encoder of `texforce sample`, or make a LoRA of it "
    "with `texforce fuse --extract BASE TUNED`"
)
_KNOWN = "LoRAs of SD 1.x, SD 2.x and SDXL are read, whole or not at all"
_ALONE = "use it by itself in a tool that knows it, or merge it into a model there and use --extract"
_LONGEST_CONFIG = 1_000_000
_LARGEST_ALPHA = 1e30
_PEFT_ALPHA = 8
"""What PEFT takes where its config says nothing."""
_CHANGES_BASE = ("pissa", "corda", "olora", "lora_ga", "loftq")
"""What PEFT begins with (init_lora_weights) by taking it out of the base weights: B A alone is not the change then."""
_NO_SUM = ("modules_to_save", "use_qalora", "use_bdlora", "kasa_config", "alora_invocation_tokens", "layer_replication")
"""What else in a PEFT config makes the change of a weight another one than B A."""


def find_lora(source: str) -> list[Path]:
    """The files that a path names: itself, or those in an adapter, checkpoint, run or PEFT folder.

    Raises:
        UsageError: nothing is there, or several that could be meant.
    """
    try:
        path = user_path(source)
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise UsageError(f"there is no LoRA '{source}'", "check the path")
        for name in _FILES:
            if (path / name).is_file():
                return [path / name]
        parts = [[path / part / name for name in (PEFT_NAME, "adapter_model.bin")] for part in COMPONENTS]
        found = [next(file for file in files if file.is_file()) for files in parts if any(f.is_file() for f in files)]
        found = found or _weights_in(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise no_place(source, error) from error
    if not found:
        raise UsageError(f"the folder '{source}' holds no LoRA", f"there is no {FILE_NAME} or {PEFT_NAME} in it")
    if len(found) > 1 and found[0].parent == path:
        names = ", ".join(part.name for part in found[:5])
        raise UsageError(f"the folder '{source}' holds several files ({names})", "name one of them")
    return found


def _weights_in(folder: Path) -> list[Path]:
    files = [file for file in folder.glob("*.safetensors") if not file.name.startswith(".")]  # of macOS, or half made
    return sorted(file for file in files if file.is_file())


def no_place(source: str, error: Exception) -> UsageError:
    """The sentence for a path that cannot be looked at: a name too long, a folder that is closed, no such ~user."""
    reason = getattr(error, "strerror", None) or error
    return UsageError(f"'{source[:200]}' cannot be looked at ({reason})", "check the path")


def read_lora(source: str, *, allow_pickle: bool = False) -> Lora:
    """Read a LoRA of any known format; its factors stay on the disk until they are asked for.

    Raises:
        UsageError: no such file, or a pickle that was not allowed.
        TexforceError: damaged, incomplete, or something that is no LoRA; the sentence names the file and the key.
    """
    files: list[Path] = []
    modules: dict[str, LoraModule] = {}
    formats: Counter[str] = Counter()
    metadata: dict[str, str] = {}
    warnings: list[str] = []
    for file in find_lora(source):
        tensors: Tensors
        if file.suffix in PICKLES:
            if not allow_pickle:
                raise UsageError(
                    f"'{file}' is a pickle, which can run code",
                    "convert it: texforce fuse FILE --allow-pickle --out NEW.safetensors reads its tensors alone",
                )
            tensors = read_pickle(file)
            about: Mapping[str, str] = {}
        else:
            opened = TensorFile.open(file)
            tensors, about = opened, opened.metadata
        beside = _config_of(tensors)
        config = _adapter_config(beside) if beside else {}
        files += [file, beside] if beside else [file]
        component = file.parent.name if file.parent.name in COMPONENTS else None
        scales = _Scales.of(file, about, config)
        own = _modules(tensors, scales, component)
        for module, format in own:
            other = modules.setdefault(module.name, module)
            if other is not module:
                raise TexforceError(
                    f"'{file}' holds '{shown(module.a_key)}', which '{other.tensors.path}' holds as well",
                    "keep one of them",
                )
            formats[format] += 1
        if not scales.configs and any(format == "PEFT" for _, format in own):
            lost = f"comes without its {PEFT_CONFIG}"
            if not beside and (file.parent / PEFT_CONFIG).is_file():
                lost = f"has no {PEFT_CONFIG} that is surely its own"
            warnings.append(f"'{file}' {lost}: its alpha is not known and taken to be its rank")
        metadata.update(about)
        if isinstance(config.get("base_model_name_or_path"), str):
            metadata["base_model_name_or_path"] = config["base_model_name_or_path"]
    ordered = {name: modules[name] for name in sorted(modules)}
    format = " + ".join(name for name, _ in formats.most_common())
    bases = bases_of(ordered.values(), metadata, f"'{source}'")
    return Lora(source, tuple(files), format, ordered, metadata, bases, tuple(warnings))


@dataclass(frozen=True)
class _Scales:
    """What a PEFT config, or the same written into a header, says of alpha and rank. Each is by component; "" is any."""

    file: Path
    configs: Mapping[str, Mapping[str, Any]]
    patterns: Mapping[str, _Patterns]

    @classmethod
    def of(cls, file: Path, metadata: Mapping[str, str], config: Mapping[str, Any]) -> _Scales:
        """The config beside a file, or in the header that diffusers writes: of a pipeline with the component before each
        name (`unet.lora_alpha`), of one model without."""
        configs = {"": config} if config else {}
        for key, value in told(metadata, ADAPTER_METADATA).items():
            component, _, name = key.rpartition(".")
            configs[component] = {**configs.get(component, {}), name: value}
        for found in configs.values():
            _refuse_config(file, found)
        return cls(file, configs, {key: _Patterns(file, found.get("alpha_pattern")) for key, found in configs.items()})

    def scale(self, component: str, path: str, rank: int) -> float:
        """alpha / rank of a module, alpha / sqrt(rank) with use_rslora; 1 where nothing is said."""
        of = component if self.configs.get(component) else ""
        config = self.configs.get(of, {})
        usual = config.get("lora_alpha", _PEFT_ALPHA if "" in self.configs else None)
        alpha = self.patterns[of].get(path, usual) if of in self.patterns else usual
        if alpha is None:
            return 1.0
        known = isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) < _LARGEST_ALPHA
        if not known:  # neither is NaN below anything
            raise TexforceError(f"'{self.file}' comes with an alpha of {str(alpha)[:40]!r}", "it should be a number")
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def _modules(tensors: Tensors, scales: _Scales, component: str | None) -> list[tuple[LoraModule, str]]:
    """The modules of one file with the format of each."""
    found: dict[str, dict[str, tuple[str, Place]]] = {}
    file, entries = tensors.path, tensors.entries
    _refuse_kinds(file, entries)
    places = {key: parse_key(key) for key in entries}
    component = component or ("text_encoder_2" if _is_second_encoder(places, entries) else None)
    for key, place in places.items():
        if place is None:
            raise TexforceError(f"'{file}' holds '{shown(key)}', which is of no LoRA of SD 1.x, SD 2.x or SDXL", _KNOWN)
        if place.bare and place.component == "text_encoder" and component == "text_encoder_2":
            place = replace(place, component=component)
        if place.bare and component and place.component != component:
            raise TexforceError(
                f"'{file}' holds '{shown(key)}', which is of {place.component}, in a folder of {component}",
                "check the folder",
            )
        roles = found.setdefault(place.module, {})
        if place.role in roles:
            raise TexforceError(
                f"'{file}' holds '{shown(key)}' and '{shown(roles[place.role][0])}', which are the same",
                "keep one of them",
            )
        roles[place.role] = (key, place)
    modules = []
    for roles in found.values():
        if "A" not in roles or "B" not in roles:
            key = next(iter(roles.values()))[0]
            wanting = " and ".join(
                {"A": "lora_A (down)", "B": "lora_B (up)"}[role] for role in "AB" if role not in roles
            )
            raise TexforceError(f"'{file}' has '{shown(key)}' without its {wanting}", "the file is incomplete")
        modules.append((_module(tensors, roles, scales), roles["A"][1].format))
    return modules


def _module(tensors: Tensors, roles: Mapping[str, tuple[str, Place]], scales: _Scales) -> LoraModule:
    (a_key, place), (b_key, _) = roles["A"], roles["B"]
    a, b = tensors.entries[a_key].shape, tensors.entries[b_key].shape
    fits = len(a) in (2, 4) and len(b) in (2, 4) and b[2:] in ((), (1, 1)) and a[:1] == b[1:2] and 0 not in (*a, *b)
    if not fits:
        raise TexforceError(
            f"'{tensors.path}' has '{shown(a_key)}' of shape {list(a)} and '{shown(b_key)}' of shape {list(b)}",
            "they cannot be multiplied",
        )
    if math.prod(a[2:]) > 1 and not (place.component == "unet" and is_convolution(place.path)):
        raise TexforceError(
            f"'{tensors.path}' has '{shown(a_key)}' of shape {list(a)}, which is of a convolution", "that layer is none"
        )
    rank = a[0]
    if "alpha" in roles:
        alpha = tensors.finite(roles["alpha"][0])
        if alpha.size != 1:
            raise TexforceError(
                f"'{tensors.path}' has '{shown(roles['alpha'][0])}' of shape {list(alpha.shape)}",
                "alpha is one number",
            )
        if not abs(value := float(alpha.reshape(()))) < _LARGEST_ALPHA:
            raise TexforceError(
                f"'{tensors.path}' gives '{shown(roles['alpha'][0])}' as {value:g}", "no LoRA has an alpha of this size"
            )
        scale = value / rank
    else:
        scale = scales.scale(place.component, place.path, rank)
    return LoraModule(place.component, place.path, rank, math.prod(a[1:]), b[0], a[2:], scale, tensors, a_key, b_key)


def _is_second_encoder(places: Mapping[str, Place | None], entries: Mapping[str, Entry]) -> bool:
    """Whether keys that name no component are those of SDXL's second encoder."""
    return any(
        place is not None
        and place.bare
        and place.component == "text_encoder"
        and place.role == "A"
        and of_second_encoder(place.path, entries[key].shape)
        for key, place in places.items()
    )


def _refuse_kinds(file: Path, keys: Mapping[str, object]) -> None:
    if not keys:
        raise TexforceError(f"'{file}' holds no tensors", "it is not a LoRA")
    for key in keys:
        kind = next((kind for pattern, kind in REFUSED if pattern.search(key)), None)
        if kind:
            raise TexforceError(
                f"'{file}' is {kind} (key '{shown(key)}'), which no sum of LoRAs can hold",
                _ALONE,
            )
    if not any("lora" in key.lower() for key in keys):
        whole = any(locate(key.rpartition(".")[0]) for key in keys)
        raise TexforceError(f"'{file}' is no LoRA (key '{shown(next(iter(keys)))}')", _FULL if whole else _KNOWN)


def _config_of(tensors: Tensors) -> Path | None:
    """The adapter_config.json beside PEFT's weights: beside their name, or the only weights that it can be of."""
    file, path = tensors.path, tensors.path.parent / PEFT_CONFIG
    if not path.is_file():
        return None
    if file.name.startswith("adapter_model."):
        return path
    if file.suffix in PICKLES or (file.parent / "adapter_model.bin").exists():
        return None
    others = (other for other in _weights_in(file.parent) if other != file)
    return path if _has_pefts_names(tensors) and not any(map(_may_be_pefts, others)) else None


def _may_be_pefts(file: Path) -> bool:
    try:
        return _has_pefts_names(TensorFile.open(file))
    except TexforceError:
        return True


def _has_pefts_names(tensors: Tensors) -> bool:
    return any(key.startswith("base_model.model.") for key in tensors.entries)


def _adapter_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LONGEST_CONFIG:
            raise ValueError("it is too long")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no table")
    except (OSError, ValueError, RecursionError) as error:
        raise TexforceError(f"'{path}' cannot be read ({first_line(error)})", "copy it again") from error
    return config


def _refuse_config(file: Path, config: Mapping[str, Any]) -> None:
    kind, start = config.get("peft_type", "LORA"), config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise TexforceError(
            f"'{file}' is a PEFT adapter made with init_lora_weights '{shown(start)}', which changed the base weights too",
            "save it in peft with path_initial_model_for_weight_conversion (PiSSA, CorDA, OLoRA), or merge it there and use --extract",
        )
    said: dict[str, Callable[[Any], bool]] = {
        "use_dora": lambda value: value is True,
        "lora_bias": lambda value: value is True,
        "bias": lambda value: value not in (None, "none"),
        **dict.fromkeys(_NO_SUM, bool),
    }
    wrong = [name for name, refused in said.items() if refused(config.get(name))]
    if kind != "LORA" or wrong:
        what = f"of the type {str(kind)[:20]}" if kind != "LORA" else f"made with {' and '.join(wrong)}"
        raise TexforceError(f"'{file}' is a PEFT adapter {what}, which no sum of LoRAs can hold", _ALONE)


class _Patterns:
    """PEFT's rule: the first pattern that is the name, or the end of the name at a dot, decides."""

    def __init__(self, file: Path, patterns: Any) -> None:
        self._file, self._odd = file, math.inf
        self._items = list(patterns.items()) if isinstance(patterns, dict) else []
        self._orders: dict[tuple[str, bool], int] = {}  # (name, whether it is the whole name) -> which pattern
        for order, (pattern, _) in enumerate(self._items):
            literal = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if set(literal) & set("*+?()[]{}|\\^$"):
                self._odd = order
                break
            self._orders.setdefault((literal, pattern.startswith("^")), order)

    def get(self, path: str, default: Any) -> Any:
        """The value of a module.

        Raises:
            TexforceError: a pattern that is no name comes before one that decides.
        """
        parts = path.split(".")
        ends = [(".".join(parts[i:]), False) for i in range(1, len(parts))]
        names = [(name, whole) for name in (path, path.removeprefix("text_model.")) for whole in (True, False)]
        order = min((self._orders[key] for key in (*names, *ends) if key in self._orders), default=math.inf)
        if order > self._odd:
            raise TexforceError(
                f"'{self._file}' comes with the pattern '{shown(self._items[int(self._odd)][0])}'",
                "only names of modules are understood",
            )
        return default if order == math.inf else self._items[int(order)][1]
