"""Drawing the pictures of an evaluation: with which settings, in which batches, on which device."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from texforce_cli.diffusion.sampler import too_full
from texforce_cli.errors import Interrupted, TexforceError, UsageError
from texforce_cli.files import placed
from texforce_cli.team import launched
from texforce_cli.workflows.drawing import DrawingOptions
from texforce_cli.workflows.evaluation.layout import (
    Layout,
    note_drawn,
    note_failed,
    read_layout,
    read_layouts,
    write_layout,
)
from texforce_cli.workflows.evaluation.pictures import Item, items_of, save_pictures
from texforce_cli.workflows.evaluation.request import EvalRequest, prompts_of
from texforce_cli.workflows.evaluation.variants import Variant
from texforce_cli.workflows.events import Listener, Progressed, Warned
from texforce_cli.workflows.loras import LoadedLora, open_lora
from texforce_cli.workflows.stopping import StopRequest

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from texforce_cli.diffusion.models import ModelSource
    from texforce_cli.diffusion.policy import Denoising, Policy

Failed = Callable[[str, Item, str], None]
"""Is told the variant, the cell and why it has no picture."""

_HOPELESS = 16
"""After so many failures in a row a batch that fails is not taken apart to find whose fault it is."""
_LEFT_TO_LORAS = ("steps", "guidance", "eta", "negative_prompt")
_NO_SETTING = ("batch", "device", "allow_pickle")


@dataclass(frozen=True)
class Recipe:
    """All that decides the pictures of a variant; `settings` says it in plain values, the same on every machine."""

    variant: Variant
    loras: Sequence[LoadedLora]
    trained: Mapping[str, Any]
    source: ModelSource
    denoising: Denoising
    settings: Mapping[str, Any]


def recipes(request: EvalRequest, *, to_draw: bool = False) -> list[Recipe]:
    """Of every variant that is drawn; LoRAs are read and weights hashed, no model is loaded. `to_draw`: a branch of the Hub is
    called by the commit that will be loaded.

    Raises:
        UsageError, TexforceError: a model or LoRA that is not there or cannot be read.
    """
    from texforce_cli.diffusion.models import hub_index
    from texforce_cli.workflows.drawing import denoising_for, source_for
    from texforce_cli.workflows.loras import hashes_of, load_lora

    pickle = request.allow_pickle
    loaded = {v.name: [load_lora(text, allow_pickle=pickle) for text in v.loras] for v in request.variants}
    first = next((lora.trained for loras in loaded.values() for lora in loras if lora.trained), {})
    made = []
    for variant in (v for v in request.variants if not v.images):
        loras = loaded[variant.name]
        trained = next((lora.trained for lora in loras if lora.trained), {})
        source = source_for(variant.model, trained or first, request.device)
        if to_draw and source.kind == "hub":  # by its branch the first pictures would be drawn again by a second run
            with contextlib.suppress(Exception):  # whatever hinders it will hinder loading, which says so
                hub_index(source)
        denoising = denoising_for(request, first, source.family)
        settings = {
            **_of_model(source),
            "weights": hashes_of(variant.replaced, allow_pickle=pickle),
            "loras": [lora.about for lora in loras],
            "uncond_embedding": trained.get("uncond_embedding") == "base",
            "denoising": asdict(denoising),
            "scheduler": request.scheduler,
            "precision": request.precision,
        }
        made.append(Recipe(variant, loras, trained, source, denoising, json.loads(json.dumps(settings))))
    return made


def settings_of(request: EvalRequest) -> dict[str, Mapping[str, Any]]:
    """Variant -> the settings that its pictures must have been drawn with. No model is needed.

    They are as kept beside the pictures, while the same is asked for and each LoRA, model and whole weights that are still there
    are the same. Else they are found anew; where that fails, no picture can be of these settings.
    """
    drawn = [v for v in request.variants if not v.images]
    kept = {v.name: read_layout(request.out, v.name) for v in drawn}
    found = {v.name: one.settings for v in drawn if (one := kept[v.name]) and _still(request, v, one)}
    changed = [v.name for v in drawn if v.name not in found]
    if changed:
        try:
            anew = {recipe.variant.name: recipe.settings for recipe in recipes(request)}
        except TexforceError:
            anew = {}
        for name in changed:
            one, now = kept[name], anew.get(name, {})
            found[name] = one.settings if one and one.makes(now) else now
    return found


def _asked(request: EvalRequest, variant: Variant) -> str:
    """A hash of all words that decide a variant's settings: a record that is sent on holds no path of this machine."""
    options = {f.name: getattr(request, f.name) for f in fields(DrawingOptions) if f.name not in _NO_SETTING}
    left = variant.model == "auto" or any(options[name] is None for name in _LEFT_TO_LORAS)
    others = [text for v in request.variants for text in v.loras] if left else []
    text = json.dumps([asdict(variant), options, others], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _still(request: EvalRequest, variant: Variant, kept: Layout) -> bool:
    """Whether the same is asked for as when the pictures were drawn, of files that are the same, as far as they are there."""
    from texforce_cli.workflows.loras import weights_of

    loras, weights = kept.settings.get("loras"), kept.settings.get("weights")
    if kept.asked != _asked(request, variant) or not isinstance(loras, list) or len(loras) != len(variant.loras):
        return False
    pickle = request.allow_pickle

    def hashed(component: str, path: str) -> list[str]:
        return weights_of(component, path, allow_pickle=pickle).sha256()

    known = weights if isinstance(weights, dict) else {}
    now = {
        **kept.settings,
        **_if_there({}, _local_model, variant.model),
        "weights": {name: _if_there(known.get(name), hashed, name, path) for name, path in variant.replaced.items()},
        "loras": [_if_there(about, _lora_now, text, pickle) for text, about in zip(variant.loras, loras)],
    }
    return kept.makes(json.loads(json.dumps(now)))


def _if_there(otherwise: Any, find: Callable[..., Any], *what: Any) -> Any:
    try:
        return find(*what)
    except TexforceError:
        return otherwise


def _lora_now(text: str, pickle: bool) -> dict[str, Any]:
    return open_lora(text, allow_pickle=pickle).about


def _local_model(name: str) -> dict[str, Any]:
    """What the settings say of a model that is a folder or file; nothing of others, which this machine may not have."""
    from texforce_cli.diffusion.models import resolve_model

    source = resolve_model(name) if placed(name) else None
    return _of_model(source) if source and source.kind in ("folder", "file") else {}


def _of_model(source: ModelSource) -> dict[str, Any]:
    """What the settings say of a model."""
    from texforce_cli.diffusion.models import configurations, fingerprint

    return {"model": fingerprint(source), **({"configs": configurations(source)} if source.kind == "folder" else {})}


def draw(
    request: EvalRequest,
    made: Sequence[Recipe],
    items: Sequence[Item],
    listener: Listener,
    stop: StopRequest,
    shard: tuple[int, int] = (0, 1),
    failed: Failed = lambda variant, item, why: None,
) -> None:
    """Draw what is missing, variant by variant, as `made` by `recipes`; of `shard` (i, n) every n-th batch from the i-th.

    What cannot be drawn is told to `failed`, and the others go on.

    Raises:
        UsageError, TexforceError: a model that cannot be loaded, a folder that cannot be written.
        Interrupted: asked to stop.
    """
    for recipe, layout in _laid_out(request, made, items):
        todo = layout.wanting(request.out, recipe.variant.name, items, shard)
        listener(Progressed(f"drawing {recipe.variant.name}", len(items) - sum(map(len, todo)), len(items)))
        if todo:
            _draw_variant(request, recipe, items, todo, listener, stop, shard, failed)
            gc.collect()  # the next model is loaded when this one's memory is free


def _laid_out(request: EvalRequest, made: Sequence[Recipe], items: Sequence[Item]) -> list[tuple[Recipe, Layout]]:
    """Each with its layout, all of which are on the disk. A variant that is new, or changed, takes the batches of one that is
    there."""
    kept = [read_layout(request.out, recipe.variant.name) for recipe in made]
    own = [one if one and one.makes(recipe.settings) else None for recipe, one in zip(made, kept)]
    others = read_layouts(request.out)
    laid_out = []
    for recipe, earlier, mine in zip(made, kept, own):
        settings = mine.settings if mine else recipe.settings
        layout = Layout(_asked(request, recipe.variant), settings, request.batch).covering(items, mine, *own, *others)
        if layout != earlier:
            write_layout(request.out, recipe.variant.name, layout)
        laid_out.append((replace(recipe, settings=settings), layout))
    return laid_out


def draw_share(request: EvalRequest, shard: tuple[int, int], listener: Listener) -> None:
    """What one of several processes draws. What it cannot draw is missing, and the first process tries it once more.

    Raises:
        as `recipes` and `draw`
    """
    stop = StopRequest()
    prompts = prompts_of(request)
    with stop.listening():
        items = items_of([*prompts.seen, *prompts.unseen], request.seeds)
        draw(request, recipes(request, to_draw=True), items, listener, stop, shard)


def _draw_variant(
    request: EvalRequest,
    recipe: Recipe,
    items: Sequence[Item],
    todo: Sequence[Sequence[Item]],
    listener: Listener,
    stop: StopRequest,
    shard: tuple[int, int],
    failed: Failed,
) -> None:
    from texforce_cli.diffusion.adapters import stack
    from texforce_cli.diffusion.models import load_pipeline
    from texforce_cli.workflows.drawing import drawn_by, policy_for
    from texforce_cli.workflows.loras import put_weights

    variant = recipe.variant
    pipeline = load_pipeline(
        recipe.source, device=_device(request.device, shard), precision=request.precision, safety_checker=False
    )
    for component, path in variant.replaced.items():
        put_weights(pipeline, component, path, allow_pickle=request.allow_pickle)
    policy = policy_for(pipeline, recipe.denoising, recipe.trained)
    by = drawn_by(policy.device)
    stack(pipeline, [(lora.lora.source, lora.arrays) for lora in recipe.loras])
    _warn_of_long_prompts(policy, items, listener)
    done = len(items) - sum(map(len, todo))
    for part, drawn in _drawn(policy, request, todo, listener, stop):
        if isinstance(drawn, _Failure):
            note_failed(request.out, variant.name, part, drawn.why)
            for item in part:
                failed(variant.name, item, f"it could not be drawn ({drawn.why})")
        else:
            save_pictures(request.out, variant.name, part, drawn, recipe.settings, by)
            note_drawn(request.out, variant.name, part)
        done += len(part)
        listener(Progressed(f"drawing {variant.name}", done, len(items)))


@dataclass(frozen=True)
class _Failure:
    """Why a batch was not drawn; the error itself would hold the memory that was filled."""

    why: str
    memory: bool = False


def _drawn(
    policy: Policy, request: EvalRequest, todo: Sequence[Sequence[Item]], listener: Listener, stop: StopRequest
) -> Iterator[tuple[Sequence[Item], Sequence[Image.Image] | _Failure]]:
    """The batches with their pictures. One that fails is halved, down to the picture that cannot be drawn."""
    waiting, room, lost = list(reversed(todo)), request.batch, 0
    while waiting:
        stop.check()
        part = waiting.pop()
        if len(part) > room:
            waiting += [part[room:], part[:room]]
            continue
        drawn = _try_to_draw(policy, request.scheduler, part)
        failure = drawn if isinstance(drawn, _Failure) else None
        if failure and len(part) > 1 and (failure.memory or lost < _HOPELESS):
            half = len(part) // 2
            waiting += [part[half:], part[:half]]
            if failure.memory:
                room = half
                listener(Warned(too_full(policy.device, len(part), half)))
            continue
        lost = lost + len(part) if failure else 0
        yield part, drawn


def _try_to_draw(policy: Policy, scheduler: str, part: Sequence[Item]) -> Sequence[Image.Image] | _Failure:
    from texforce_cli.devices import if_room
    from texforce_cli.workflows.drawing import draw_pictures

    pairs = [(item.text, item.noise) for item in part]
    try:
        drawn = if_room(functools.partial(draw_pictures, policy, scheduler, pairs))
    except (UsageError, Interrupted):
        raise
    except Exception as error:  # whatever the libraries or the device say: it is about these pictures
        return _Failure(" ".join(str(error).split())[:200] or type(error).__name__)
    return _Failure(f"the memory of {policy.device} is full", memory=True) if drawn is None else drawn


def _device(name: str, shard: tuple[int, int]) -> torch.device:
    """The device, where the metrics of this process are from here on too; of several processes each takes a GPU of its own, as
    far as there are so many."""
    import torch

    from texforce_cli.devices import claim, resolve_device

    device = resolve_device(name)
    if shard[1] > 1 and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", gpu_of(shard[0], torch.cuda.device_count()))
    claim(str(device))
    return device


def gpu_of(process: int, count: int, environment: Mapping[str, str] = os.environ) -> int:
    """The GPU, of `count`, that a process draws on: by its place on this machine, where a launcher tells it."""
    local = environment.get("LOCAL_RANK", "") if launched(environment)[1] > 1 else ""
    return (int(local) if local.isdecimal() else process) % count


def _warn_of_long_prompts(policy: Any, items: Sequence[Item], listener: Listener) -> None:
    from texforce_cli.workflows.drawing import too_long

    for sentence in too_long(policy, (item.text for item in items)):
        listener(Warned(sentence))
