"""What is compared: a variant is a model with LoRAs and whole weights, or a folder of pictures made elsewhere."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from texforce_cli.errors import UsageError, first_line
from texforce_cli.files import placed
from texforce_cli.lora.spec import ends_as_if_with_a_weight, parse_lora, telling

_NAME = re.compile(r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)(\.|$))[A-Za-z0-9]([\w.-]{0,58}[\w-])?")
"""A name that can be a folder's, on Windows too."""
_COMPONENTS = {"unet": "unet", "text-encoder": "text_encoder"}
_FIELDS = {"name": str, "model": str, "unet": str, "text_encoder": str, "loras": list, "images": str}


@dataclass(frozen=True)
class Variant:
    """`model` as in `--model`, `loras` as `PATH[:WEIGHT]`; or `images`, a folder of pictures that somebody else drew."""

    name: str
    model: str = "auto"
    unet: str | None = None
    text_encoder: str | None = None
    loras: tuple[str, ...] = ()
    images: str | None = None

    @property
    def replaced(self) -> dict[str, str]:
        """The components that get other weights, with their folder or file."""
        return {name: path for name, path in (("unet", self.unet), ("text_encoder", self.text_encoder)) if path}

    @property
    def description(self) -> str:
        """What it is, in a line, without the folders of this machine."""
        if self.images:
            return f"pictures of {Path(self.images).name}"
        parts = [Path(self.model).name or self.model]
        parts += [f"{name} {_called(path)}" for name, path in self.replaced.items()]
        parts += [f"{_called(spec.source)}:{spec.weights}" for spec in map(parse_lora, self.loras)]
        return " + ".join(parts)


def parse_variant(text: str) -> Variant:
    """`NAME=MODEL[+unet=PATH][+text-encoder=PATH][+LORA[:WEIGHT]]...`; a `+` within a path that exists does not divide.

    Raises:
        UsageError: no name, or one that is no name for a folder; an empty part; weights of a component twice.
    """
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise UsageError(f"the variant '{text}' is not NAME=MODEL", "for example tex=sd15+runs/a/adapter:0.8")
    pieces = _divide(rest)
    if not all(pieces):
        raise UsageError(f"the variant '{text}' has an empty part", "write NAME=MODEL+LORA+LORA:0.5")
    replaced: dict[str, str] = {}
    loras = []
    for piece in pieces[1:]:
        component, path = _component(piece)
        if component in replaced or (component and not path):
            raise UsageError(
                f"the variant '{text}' has no or two weights of its {component}", "give them once: unet=PATH"
            )
        if component:
            replaced[component] = path
        else:
            loras.append(path)
    return _checked(Variant(name, pieces[0], loras=tuple(loras), **replaced))


def parse_images(text: str) -> Variant:
    """`NAME=DIR`: a folder of pictures.

    Raises:
        UsageError: no name, or no such folder.
    """
    name, equals, folder = text.partition("=")
    if not equals or not folder:
        raise UsageError(f"'{text}' is not NAME=DIR", "for example --images other=pictures/other")
    return _checked(Variant(name, images=folder))


def read_variants(path: Path) -> list[Variant]:
    """`[[variants]]` tables of a TOML file, with name, model, unet, text_encoder, loras, images.

    Raises:
        UsageError: it cannot be read, or says something else; the sentence names the variant.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"'{path}' cannot be read ({first_line(error)})", "check --variants") from error
    return variants_of(document.get("variants"), path)


def variants_of(tables: Any, path: Path) -> list[Variant]:
    """The variants that `path` says.

    Raises:
        UsageError: they are none; the sentence names the variant.
    """
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"'{path}' has no [[variants]]", "give each variant a table with a name")
    return [_of_table(path, number, table) for number, table in enumerate(tables, 1)]


def check_variants(variants: Sequence[Variant], baseline: str | None) -> str:
    """The baseline's name: as given, else the first variant.

    Raises:
        UsageError: no variant, a name twice, or a baseline that is none of them.
    """
    names = [variant.name for variant in variants]
    if not names:
        raise UsageError(
            "there is nothing to evaluate", "give --variant base=tiny --variant tex=tiny+runs/a, or --images"
        )
    folders = [name.casefold() for name in names]  # their pictures': the same on Windows and macOS
    twice = next((name for name, folder in zip(names, folders) if folders.count(folder) > 1), None)
    if twice:
        raise UsageError(
            f"the variant '{twice}' is given twice", "give each a name of its own, not only in large and small letters"
        )
    if baseline is not None and baseline not in names:
        raise UsageError(f"the baseline '{baseline}' is no variant", f"one of {', '.join(names)}")
    return baseline or names[0]


def _of_table(path: Path, number: int, table: dict[str, Any]) -> Variant:
    for key, value in table.items():
        if key not in _FIELDS:
            raise UsageError(f"variant {number} of '{path}' has '{key}'", f"it can have {', '.join(_FIELDS)}")
        if not isinstance(value, _FIELDS[key]) or (key == "loras" and not all(isinstance(x, str) for x in value)):
            raise UsageError(
                f"'{key}' of variant {number} of '{path}' is {value!r}", "write a text, loras a list of texts"
            )
    if "name" not in table:
        raise UsageError(f"variant {number} of '{path}' has no name", 'add name = "..."')
    values = {**table, "loras": tuple(table.get("loras", ()))}
    if values.get("images") and len({key for key, value in values.items() if value}) > 2:
        raise UsageError(f"variant '{table['name']}' of '{path}' has images and a model", "give one of them")
    return _checked(Variant(**values))


def _checked(variant: Variant) -> Variant:
    if not _NAME.fullmatch(variant.name):
        raise UsageError(f"'{variant.name}' is no name for a variant", "use letters, digits, '-', '_' and '.' within")
    if variant.images and not ((folder := placed(variant.images)) and folder.is_dir()):
        raise UsageError(f"there is no folder '{variant.images}'", "check --images")
    return replace(variant, loras=tuple(map(_weighted, variant.loras)))


def _weighted(lora: str) -> str:
    """A LoRA in a path that itself ends as if with a weight, `runs/a:1`, has its weight written behind that."""
    return f"{lora}:1" if ends_as_if_with_a_weight(lora) and parse_lora(lora).source == lora else lora


def _divide(text: str) -> list[str]:
    """Split at `+`, but keep together the longest run of parts that names something on the disk."""
    parts, pieces = text.split("+"), []
    while parts:
        for count in range(len(parts), 0, -1):
            piece = "+".join(parts[:count])
            path = _component(piece)[1]
            if count == 1 or placed(parse_lora(path).source):
                pieces.append(piece)
                parts = parts[count:]
                break
    return pieces


def _component(piece: str) -> tuple[str, str]:
    """Which component a part gives whole weights to ("" for a LoRA, also in a file that is called so), and the path that it names."""
    name, equals, path = piece.partition("=")
    if not equals or name not in _COMPONENTS or placed(parse_lora(piece).source):
        return "", piece
    return _COMPONENTS[name], path


def _called(text: str) -> str:
    """What a path is called, without the folders that it lies in."""
    return "/".join(telling(Path(text))) or text
