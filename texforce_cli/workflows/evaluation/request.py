"""What an evaluation is asked for, and how its folder remembers that."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import placed, read_json, write_json, write_text
from texforce_cli.presets import Family
from texforce_cli.prompts import PromptSet, load_prompts, read_prompts
from texforce_cli.rewards.terms import parse_terms
from texforce_cli.workflows.drawing import DrawingOptions, source_for
from texforce_cli.workflows.evaluation.pictures import prompts_told
from texforce_cli.workflows.evaluation.variants import (
    Variant,
    parse_images,
    parse_variant,
    read_variants,
    variants_of,
)
from texforce_cli.workflows.loras import trained_on, training_of

Stage = Literal["all", "images", "scores", "report"]

_RECORD = "eval.json"
_PROMPTS = "prompts.jsonl"
_TRANSIENT = ("stage", "out", "device", "single_file", "recorded", "given")


@dataclass(frozen=True)
class EvalRequest(DrawingOptions):
    """What to compare, on which prompts and seeds, by which metrics, and where it goes.

    `steps`, `guidance`, `eta`, `negative_prompt` None: as the first LoRA was trained, or as is usual; the same for every
    variant. Not `recorded`: the folder is not made an evaluation that can be gone on with. `given` are the names of the
    fields that somebody chose: without variants, they change what the folder was made with.
    """

    out: Path
    variants: tuple[Variant, ...] = ()
    baseline: str | None = None
    prompts: str = ""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    metrics: tuple[str, ...] = ()
    metric_options: tuple[str, ...] = ()
    votes: tuple[str, ...] = ()
    single_file: bool = False
    stage: Stage = "all"
    recorded: bool = True
    given: tuple[str, ...] = ()


def gather_variants(
    short: Sequence[str],
    file: Path | None,
    images: Sequence[str],
    *,
    unet: str | None = None,
    text_encoder: str | None = None,
) -> tuple[Variant, ...]:
    """The variants of `--variant`, `--variants FILE` and `--images`, in this order; `unet` and `text_encoder` are whole weights of
    those that are drawn and name none themselves.

    Raises:
        UsageError: what is said of a variant cannot be, or weights of no variant.
    """
    drawn = [*map(parse_variant, short), *(read_variants(file) if file else [])]
    if (unet or text_encoder) and not drawn:
        raise UsageError("--unet and --text-encoder are of no variant", "give --variant or --variants beside them")
    weighted = [
        v if v.images else replace(v, unet=v.unet or unet, text_encoder=v.text_encoder or text_encoder) for v in drawn
    ]
    return (*weighted, *map(parse_images, images))


def recalled(request: EvalRequest) -> EvalRequest:
    """A request that names no variant is the one that the folder was made with, but for what it gives.

    Raises:
        UsageError: the folder holds no evaluation, or one of variants that cannot be.
        TexforceError: its record cannot be read.
    """
    record = request.out / _RECORD
    if request.variants:
        return request
    if not record.is_file():
        raise UsageError(f"'{request.out}' holds no evaluation", "give --variant, --prompts and --metric")
    try:
        stored = dict(read_json(record)["request"])
        tables = [_said(table) for table in stored.pop("variants")]
        kinds = {name: kind for name, kind in get_type_hints(EvalRequest).items() if name not in _TRANSIENT}
        values = {name: _typed(stored[name], kinds[name]) for name in kinds.keys() & stored.keys()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TexforceError(f"'{record}' cannot be read", "give --variant, --prompts and --metric again") from error
    variants = tuple(variants_of(tables, record))
    given = {*request.given, *(name for name in ("votes", "metrics") if getattr(request, name))}
    if "metrics" in given:
        given.add("metric_options")
    else:  # earlier versions of texforce took a weight, which did nothing
        values["metrics"] = tuple(term.name for term in parse_terms(values.get("metrics", ())))
    asked = {name: getattr(request, name) for name in (*_TRANSIENT, *given)}
    return replace(EvalRequest(request.out), **{**values, **asked, "variants": variants})


def _said(table: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recorded variant is not as it is where nobody says anything."""
    usual = asdict(Variant(""))
    return {key: value for key, value in table.items() if value not in (None, usual.get(key))}


def _typed(value: Any, kind: Any) -> Any:
    """A value of JSON as one of this kind.

    Raises:
        TypeError: it is of another.
    """
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_typed(item, get_args(kind)[0]) for item in value)
    plain = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    if type(value) in plain or (type(value) is int and float in plain) or any(value in get_args(k) for k in plain):
        return value
    raise TypeError(f"{value!r} is no {kind}")


def record(request: EvalRequest, trained: Mapping[str, Sequence[str]], prompts: PromptSet) -> None:
    """Remember the request, its prompts, and what its LoRAs were `trained` on.

    Raises:
        TexforceError: the folder cannot be written.
    """
    from texforce_cli.workflows.run_folder import versions

    stored = {key: value for key, value in asdict(request).items() if key not in _TRANSIENT}
    made_with = versions()
    if request.stage == "report":  # which draws and scores nothing: the versions stay those that did
        made_with = _recorded(request.out, "versions") or made_with
    kept = request.out / _PROMPTS
    if Path(prompts.source).resolve() != kept.resolve():
        write_text(kept, prompts.to_jsonl())
    about = {"name": prompts.name, "sha256": prompts.sha256}
    document = {"request": stored, "prompts": about, "trained_on": trained, "versions": made_with}
    write_json(request.out / _RECORD, document)


def _recorded(folder: Path, *names: str) -> Any:
    """What a folder's record says by these names, one within the other; None where it says nothing."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        found = read_json(folder / _RECORD)
        for name in names:
            found = found[name]
        return found
    return None


def rewards_trained_on(request: EvalRequest) -> dict[str, list[str]]:
    """LoRA, as it was named -> the rewards that it was trained on; for one that is gone, as the folder remembers it.

    Raises:
        UsageError, TexforceError: a LoRA that is not there, or cannot be read, and that the folder does not know.
    """
    kept = _recorded(request.out, "trained_on")
    found: dict[str, list[str]] = {}
    for text in (text for variant in request.variants for text in variant.loras):
        try:
            found[text] = sorted(trained_on(text, allow_pickle=request.allow_pickle))
        except TexforceError:
            known = kept.get(text) if isinstance(kept, dict) else None
            if not isinstance(known, list):
                raise
            found[text] = list(map(str, known))
    return found


def prompts_of(request: EvalRequest) -> PromptSet:
    """The prompts; where the embedded model draws, or drew what the folders hold, its own words stand for the sets. Those of an
    evaluation that is gone on with are as the folder keeps them, but for a file that is at its place.

    Raises:
        UsageError: there are none, or they cannot be read.
    """
    if not request.prompts:
        raise UsageError("there are no prompts", "give --prompts SET or FILE")
    gone_on = "prompts" not in request.given and request.prompts == _recorded(request.out, "request", "prompts")
    if gone_on and not placed(request.prompts) and (kept := _kept_prompts(request.out)):
        return kept
    models = {v.model for v in request.variants if not v.images}
    if not models:
        return _prompts_shown(request)
    tiny = "tiny" in models or ("auto" in models and _chosen_family(request) == "tiny")
    return load_prompts(request.prompts, "tiny" if tiny else "sd", to_train=False)


def _kept_prompts(folder: Path) -> PromptSet | None:
    """The folder's copy of its prompts; None where there is none, or it is of others."""
    with contextlib.suppress(UsageError):
        found = replace(read_prompts(folder / _PROMPTS), name=str(_recorded(folder, "prompts", "name")))
        return found if found.sha256 == _recorded(folder, "prompts", "sha256") else None
    return None


def _prompts_shown(request: EvalRequest) -> PromptSet:
    """The set in those of its words that more of the pictures in the folders have."""
    sets = [load_prompts(request.prompts, family, to_train=False) for family in ("sd", "tiny")]
    texts = [{prompt.text for prompt in (*one.seen, *one.unseen)} for one in sets]
    if texts[0] == texts[1]:
        return sets[0]
    told = [prompt for variant in request.variants for prompt in prompts_told(variant)]
    return max(zip(sets, texts), key=lambda words: sum(prompt in words[1] for prompt in told))[0]


def _chosen_family(request: EvalRequest) -> Family:
    """That of the model `auto`: of the base of the first LoRA that tells it, whatever this machine would choose."""
    for text in (text for variant in request.variants for text in variant.loras):
        with contextlib.suppress(TexforceError):
            if trained := training_of(text, allow_pickle=request.allow_pickle):
                return source_for("auto", trained, request.device).family
    return source_for("auto", {}, request.device).family
