"""The order of an evaluation: pictures, scores, summary and report."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import write_json, write_text
from texforce_cli.judging.votes import read_votes
from texforce_cli.prompts import PromptSet, load_prompts
from texforce_cli.report.page import Page, PageMetric, PagePrompt, PageVariant, Picture, pictures_hash, write_page
from texforce_cli.report.verdicts import ranking_tabs
from texforce_cli.rewards.isolation import WorkerSettings
from texforce_cli.rewards.registry import load_registry
from texforce_cli.rewards.terms import parse_terms
from texforce_cli.team import launched
from texforce_cli.workflows.drawing import DrawingOptions
from texforce_cli.workflows.evaluation.pictures import (
    Item,
    collect,
    items_of,
    save_pictures,
    wanting,
)
from texforce_cli.workflows.evaluation.scores import (
    DIVERSITY,
    ScoreFile,
    measure_diversity,
    metrics_of,
    score_pictures,
)
from texforce_cli.workflows.evaluation.summary import MetricAbout, Summary, adjusted, summarise, write_summary
from texforce_cli.workflows.evaluation.variants import (
    Variant,
    check_variants,
    parse_images,
    parse_variant,
    read_variants,
)
from texforce_cli.workflows.evaluation.votes import count_votes
from texforce_cli.workflows.events import Listener, Note, Progressed, Warned, silent
from texforce_cli.workflows.loras import trained_on, training_of
from texforce_cli.workflows.stopping import StopRequest

Stage = Literal["all", "images", "scores", "report"]

_RECORD = "eval.json"
_TRANSIENT = ("stage", "out", "device", "shard", "single_file", "recorded")


@dataclass(frozen=True)
class EvalRequest(DrawingOptions):
    """What to compare, on which prompts and seeds, by which metrics, and where it goes.

    `steps`, `guidance`, `eta`, `negative_prompt` None: as the first LoRA was trained, or as is usual; the same for every
    variant. `shard` (i, n): draw only every n-th batch, for several processes. Not `recorded`: the folder is not made an
    evaluation that can be gone on with.
    """

    out: Path
    variants: tuple[Variant, ...] = ()
    baseline: str | None = None
    prompts: str = ""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    metrics: tuple[str, ...] = ()
    metric_options: tuple[str, ...] = ()
    reward_timeout: float = 300.0
    votes: tuple[str, ...] = ()
    single_file: bool = False
    stage: Stage = "all"
    shard: tuple[int, int] = (0, 1)
    recorded: bool = True


@dataclass(frozen=True)
class EvalResult:
    """The summary, and the page where one was made. `missing` is what lacks; nothing was put in its place."""

    folder: Path
    summary: Summary | None
    page: Path | None
    missing: tuple[Mapping[str, Any], ...]

    @property
    def sentences(self) -> list[str]:
        """What lacks, for people."""
        return [_sentence(entry) for entry in self.missing]


def gather_variants(short: Sequence[str], file: Path | None, images: Sequence[str]) -> tuple[Variant, ...]:
    """The variants of `--variant`, `--variants FILE` and `--images`, in this order."""
    listed = read_variants(file) if file else []
    return (*map(parse_variant, short), *listed, *map(parse_images, images))


def evaluate(request: EvalRequest, listener: Listener = silent) -> EvalResult:
    """Run the stages that were asked for; what earlier runs left in the folder is used.

    Raises:
        UsageError: nothing to compare, unknown names, contradicting options.
        TexforceError: a model, LoRA or metric that cannot be used, a folder that cannot be written.
        Interrupted: asked to stop; what was finished is kept.
    """
    request = recalled(request)
    baseline = check_variants(request.variants, request.baseline)
    if not request.prompts:
        raise UsageError("there are no prompts", "give --prompts SET or FILE")
    registry = load_registry()
    metrics = metrics_of(parse_terms(request.metrics, request.metric_options), registry)
    if not (metrics or ranking_tabs(request.out)) and request.stage != "images":
        raise UsageError("there is no metric", "add --metric brightness, or another of: texforce rewards")
    stop = StopRequest()
    with stop.listening():
        prompts = _prompts(request)
        items = items_of([*prompts.seen, *prompts.unseen], request.seeds)
        missing: list[dict[str, Any]] = []

        def lacks(variant: str, item: Item, what: str) -> None:
            missing.append({"variant": variant, "prompt": item.text, "seed": item.seed, "what": what})

        if request.shard == (0, 1) and request.recorded:
            _record(request)
        if request.stage in ("all", "images"):
            _draw(request, items, listener, stop)
        if request.stage == "images":
            return EvalResult(request.out, None, None, ())
        in_sample = {v.name: sorted({name for text in v.loras for name in trained_on(text)}) for v in request.variants}
        found = collect(request.out, request.variants, items, lacks)
        scores = ScoreFile(request.out / "scores.jsonl")
        if request.stage != "report":
            for metric in metrics:
                score_pictures(
                    scores,
                    metric,
                    registry,
                    found,
                    batch=request.batch,
                    workers=WorkerSettings(request.reward_timeout),
                    failed=lambda variant, item, why, name=metric.name: lacks(variant, item, f"{name}: {why}"),  # type: ignore[misc]
                    progress=lambda done, total, name=metric.name: listener(Progressed(name, done, total)),  # type: ignore[misc]
                    check=stop.check,
                )
        values: list[tuple[MetricAbout, dict[str, dict[Item, float]]]] = []
        for metric in metrics:
            about = MetricAbout(
                metric.name, metric.info.unit, metric.info.higher_is_better, metric.info.summary, metric.version
            )
            by_variant: dict[str, dict[Item, float]] = {}
            for name, pictures in found.items():
                by_variant[name] = {}
                for item, (_, sha) in pictures.items():
                    value = scores.get(sha, item.text, metric.name, metric.version)
                    if value is not None:
                        by_variant[name][item] = value
                    elif request.stage == "report":
                        lacks(name, item, f"{metric.name}: not scored")
            values.append((about, by_variant))
        values += _diversity(request, scores, found, items, stop)
        unseen = frozenset(prompt.text for prompt in prompts.unseen)
        summary = summarise(baseline, items, unseen, values, missing, _about(request, prompts, in_sample))
        page = _page(request, summary, prompts, items, found, values, in_sample)
        if request.votes:
            summary = _with_votes(request, summary, page, items)
            page = _page(request, summary, prompts, items, found, values, in_sample)
        page = replace(page, extra_tabs=ranking_tabs(request.out, pictures_hash(page)))
        write_summary(summary, request.out)
        listener(Note("writing the report"))
        written = write_page(page, request.out / "report", single_file=request.single_file)
    return EvalResult(request.out, summary, written, tuple(missing))


@dataclass(frozen=True)
class Shown:
    """The pictures that an evaluation has: variant -> item -> (file, SHA-256), the page of them without scores, and in
    sentences what is missing."""

    items: tuple[Item, ...]
    found: Mapping[str, Mapping[Item, tuple[Path, str]]]
    page: Page
    missing: tuple[str, ...]


def pictures_of(request: EvalRequest) -> Shown:
    """What there is to look at; nothing is drawn and nothing scored.

    Raises:
        UsageError: no prompts, no variants.
    """
    baseline = check_variants(request.variants, request.baseline)
    prompts = _prompts(request)
    items = items_of([*prompts.seen, *prompts.unseen], request.seeds)
    missing: list[dict[str, Any]] = []
    found = collect(
        request.out,
        request.variants,
        items,
        lambda variant, item, what: missing.append(
            {"variant": variant, "prompt": item.text, "seed": item.seed, "what": what}
        ),
    )
    summary = Summary(baseline, tuple(found), (), (), {}, {}, tuple(missing))
    page = _page(request, summary, prompts, items, found, [], {})
    return Shown(tuple(items), found, page, tuple(map(_sentence, missing)))


def plan_eval(request: EvalRequest) -> dict[str, Any]:
    """What would be drawn and scored, as plain values; LoRAs that are not there yet are named, no weights are loaded.

    Raises:
        UsageError, TexforceError: as `evaluate`, but for missing LoRAs.
    """
    from texforce_cli.workflows.drawing import denoising_for, source_for

    request = recalled(request)
    baseline = check_variants(request.variants, request.baseline)
    metrics = metrics_of(parse_terms(request.metrics, request.metric_options), load_registry())
    prompts = _prompts(request)
    items = items_of([*prompts.seen, *prompts.unseen], request.seeds)
    absent: list[str] = []
    trained: dict[str, dict[str, Any]] = {}
    for variant in request.variants:
        for text in variant.loras:
            try:
                trained.setdefault(variant.name, training_of(text, allow_pickle=request.allow_pickle))
            except UsageError:
                absent.append(text)
        absent += [path for path in variant.replaced.values() if not Path(path).expanduser().exists()]
    first = next((about for about in trained.values() if about), {})
    variants = []
    for variant in request.variants:
        about: dict[str, Any] = {"name": variant.name, "description": variant.description, "pictures": len(items)}
        if not variant.images:
            source = source_for(variant.model, trained.get(variant.name) or first)
            denoising = denoising_for(request, first, source.family)
            branches = 1 if denoising.guidance == 1 else 2
            about |= {"model": source.name, "steps": denoising.steps, "guidance": denoising.guidance}
            about["unet_calls"] = len(items) * denoising.steps * branches
        variants.append(about)
    return {
        "baseline": baseline,
        "prompts": {"name": prompts.name, "count": len({item.text for item in items})},
        "seeds": list(request.seeds),
        "variants": variants,
        "metrics": [metric.name for metric in metrics],
        "not_there_yet": sorted(set(absent)),
    }


def recalled(request: EvalRequest) -> EvalRequest:
    """A request that names nothing is the one that the folder was made with."""
    record = request.out / _RECORD
    if request.variants:
        return request
    if not record.is_file():
        raise UsageError(f"'{request.out}' holds no evaluation", "give --variant, --prompts and --metric")
    try:
        stored = json.loads(record.read_text(encoding="utf-8"))["request"]
        variants = tuple(Variant(**{**v, "loras": tuple(v["loras"])}) for v in stored.pop("variants"))
        known = {field.name for field in fields(EvalRequest)}
        values = {
            key: tuple(value) if isinstance(value, list) else value for key, value in stored.items() if key in known
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TexforceError(f"'{record}' cannot be read", "give --variant, --prompts and --metric again") from error
    asked = {name: getattr(request, name) for name in _TRANSIENT}
    if request.votes:
        asked["votes"] = request.votes
    if request.metrics:
        asked |= {"metrics": request.metrics, "metric_options": request.metric_options}
    return replace(EvalRequest(request.out), **{**values, **asked, "variants": variants})


def _record(request: EvalRequest) -> None:
    from texforce_cli.workflows.run_folder import versions

    stored = {key: value for key, value in asdict(request).items() if key not in _TRANSIENT}
    write_json(request.out / _RECORD, {"request": stored, "versions": versions()})


def _prompts(request: EvalRequest) -> PromptSet:
    """The prompts; where the embedded model draws, its own words stand for the sets."""
    from texforce_cli.diffusion.models import resolve_model

    models = [v.model for v in request.variants if not v.images]
    tiny = "tiny" in models or ("auto" in models and resolve_model("auto").family == "tiny")
    return load_prompts(request.prompts, "tiny" if tiny else "sd")


def _draw(request: EvalRequest, items: Sequence[Item], listener: Listener, stop: StopRequest) -> None:
    """Draw what is missing, variant by variant."""
    from texforce_cli.devices import resolve_device
    from texforce_cli.diffusion.adapters import stack
    from texforce_cli.diffusion.models import fingerprint, load_pipeline
    from texforce_cli.lora.full import open_full
    from texforce_cli.workflows.drawing import denoising_for, draw_pictures, policy_for, source_for
    from texforce_cli.workflows.loras import load_lora, put_weights

    loaded = {
        v.name: [load_lora(text, allow_pickle=request.allow_pickle) for text in v.loras] for v in request.variants
    }
    first = next((lora.trained for loras in loaded.values() for lora in loras if lora.trained), {})
    for variant in request.variants:
        loras = loaded[variant.name]
        if variant.images:
            continue
        trained = next((lora.trained for lora in loras if lora.trained), {})
        source = source_for(variant.model, trained or first)
        denoising = denoising_for(request, first, source.family)
        settings = {
            "model": fingerprint(source),
            "weights": {
                name: open_full(path, allow_pickle=request.allow_pickle).sha256()
                for name, path in variant.replaced.items()
            },
            "loras": [lora.about for lora in loras],
            "uncond_embedding": trained.get("uncond_embedding") == "base",
            "denoising": asdict(denoising),
            "scheduler": request.scheduler,
            "precision": request.precision,
        }
        todo = wanting(request.out, variant.name, items, settings, batch=request.batch, shard=request.shard)
        done = len(items) - sum(map(len, todo))
        listener(Progressed(f"drawing {variant.name}", done, len(items)))
        if not todo:
            continue
        device = resolve_device(request.device)
        pipeline = load_pipeline(source, device=device, precision=request.precision, safety_checker=False)
        for component, path in variant.replaced.items():
            put_weights(pipeline, component, path, allow_pickle=request.allow_pickle)
        policy = policy_for(pipeline, denoising, trained)
        stack(pipeline, [(lora.lora.source, lora.arrays) for lora in loras])
        _warn_of_long_prompts(policy, items, listener)
        for part in todo:
            stop.check()
            pictures = draw_pictures(policy, request.scheduler, [(item.text, item.noise) for item in part])
            save_pictures(request.out, variant.name, part, pictures, settings)
            done += len(part)
            listener(Progressed(f"drawing {variant.name}", done, len(items)))


def _warn_of_long_prompts(policy: Any, items: Sequence[Item], listener: Listener) -> None:
    cut = [text for text in dict.fromkeys(item.text for item in items) if policy.too_long(text)]
    if cut:
        listener(Warned(f"{len(cut)} prompts are longer than the model reads, the first: '{cut[0][:60]}...'"))


def _diversity(
    request: EvalRequest,
    scores: ScoreFile,
    found: Mapping[str, Mapping[Item, tuple[Path, str]]],
    items: Sequence[Item],
    stop: StopRequest,
) -> list[tuple[MetricAbout, dict[str, dict[Item, float]]]]:
    """Diversity as a metric with one value a prompt, over the seeds that every variant has."""
    if len(request.seeds) < 2:
        return []
    shared = [item for item in items if all(item in pictures for pictures in found.values())]
    first = {item.text: item for item in reversed(shared)}
    by_variant = {}
    for name, pictures in found.items():
        values = measure_diversity(scores, {item: pictures[item] for item in shared}, stop.check)
        by_variant[name] = {first[text]: value for text, value in values.items()}
    about = MetricAbout(DIVERSITY, "", True, "how much the pictures of a prompt differ from seed to seed", "1")
    return [(about, by_variant)]


def _about(request: EvalRequest, prompts: PromptSet, in_sample: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    variants = [
        {"name": v.name, "description": v.description, "in_sample": list(in_sample.get(v.name, []))}
        for v in request.variants
    ]
    return {
        "prompts": {"name": prompts.name, "sha256": prompts.sha256},
        "seeds": list(request.seeds),
        "variants": variants,
    }


def _with_votes(request: EvalRequest, summary: Summary, page: Page, items: Sequence[Item]) -> Summary:
    """The summary with what people chose as one more metric."""
    data = pictures_hash(page)
    votes = [vote for path in request.votes for vote in read_votes(Path(path).expanduser(), data)]
    about, rows, wins = count_votes(votes, summary.variants, summary.baseline, items)
    return replace(
        summary,
        metrics=(*summary.metrics, about),
        rows=tuple(adjusted([*summary.rows, *rows])),
        wins={**summary.wins, about.name: wins},
    )


def _page(
    request: EvalRequest,
    summary: Summary,
    prompts: PromptSet,
    items: Sequence[Item],
    found: Mapping[str, Mapping[Item, tuple[Path, str]]],
    values: Sequence[tuple[MetricAbout, Mapping[str, Mapping[Item, float]]]],
    in_sample: Mapping[str, Sequence[str]],
) -> Page:
    unseen = {prompt.text for prompt in prompts.unseen}
    both = bool(unseen) and bool(prompts.seen)
    pictures = {}
    for name, files in found.items():
        for item, (path, sha) in files.items():
            own = {metric.name: by_variant[name][item] for metric, by_variant in values if item in by_variant[name]}
            if own or not values:  # what could not be read has no score
                pictures[name, item.prompt_id, item.seed] = Picture(path, sha, own)
    shown = {item.prompt_id: item for item in items}
    return Page(
        title=f"{' · '.join(v.name for v in request.variants)} on {prompts.name}",
        baseline=summary.baseline,
        variants=[PageVariant(v.name, v.description, frozenset(in_sample.get(v.name, []))) for v in request.variants],
        metrics=[PageMetric(m.name, m.unit, m.higher_is_better, m.summary) for m in summary.metrics],
        prompts=[
            PagePrompt(
                key,
                prompt.text,
                ("unseen" if prompt.text in unseen else "seen") if both else "",
                str(prompt.metadata.get("category", "") or ""),
            )
            for key, prompt in shown.items()
        ],
        seeds=list(dict.fromkeys(request.seeds)),
        pictures=pictures,
        rows=summary.rows,
        wins=summary.wins,
        missing=[_sentence(entry) for entry in summary.missing],
    )


def _sentence(entry: Mapping[str, Any]) -> str:
    return f"{entry['variant']}, seed {entry['seed']}, '{str(entry['prompt'])[:80]}': {entry['what']}"


def evaluate_in(processes: int, request: EvalRequest, listener: Listener = silent) -> EvalResult:
    """`evaluate`, the drawing shared among processes: those of `accelerate launch`, else `processes` of our own.

    The result is the same whatever their number. Under a launcher the first process scores and reports; the others end when
    they have drawn their part.

    Raises:
        TexforceError: as `evaluate`; one of the processes failed.
    """
    rank, world = launched()
    if world > 1:
        return _launched(request, rank, world, listener)
    if processes == 1 or request.stage in ("scores", "report"):
        return evaluate(request, listener)
    request = recalled(request)
    check_variants(request.variants, request.baseline)
    _record(request)
    _share(request, processes, listener)
    return evaluate(request, listener)


def _share(request: EvalRequest, processes: int, listener: Listener) -> None:
    """Draw in processes of our own; each draws every n-th batch."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, wait

    threads = max(1, (os.cpu_count() or 1) // processes)
    context = multiprocessing.get_context("spawn")
    prompts = _prompts(request)
    total = len(items_of([*prompts.seen, *prompts.unseen], request.seeds))
    drawn = [v for v in request.variants if not v.images]
    with ProcessPoolExecutor(processes, context, initializer=_few_threads, initargs=(threads,)) as pool:
        parts = [replace(request, stage="images", shard=(index, processes)) for index in range(processes)]
        futures = [pool.submit(evaluate, part) for part in parts]
        while wait(futures, timeout=1).not_done:
            there = sum(len(list((request.out / "pictures" / v.name).glob("*.png"))) for v in drawn)
            listener(Progressed("drawing", min(there, total * len(drawn)), total * len(drawn)))
        for future in futures:
            future.result()


def _few_threads(threads: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def _launched(request: EvalRequest, rank: int, world: int, listener: Listener) -> EvalResult:
    """One process of a launcher: draw a part; the first then waits for the others' parts, which lie in the same folder."""
    request = recalled(request)
    asked = json.dumps(asdict(replace(request, out=Path())), sort_keys=True, default=str)
    stamp = hashlib.sha256(asked.encode()).hexdigest()[:12]
    markers = [request.out / f".drawn-{stamp}-{index}-of-{world}" for index in range(world)]
    markers[rank].unlink(missing_ok=True)
    evaluate(replace(request, stage="images", shard=(rank, world)), listener)
    write_text(markers[rank], "")
    if rank:
        return EvalResult(request.out, None, None, ())
    stop = StopRequest()
    with stop.listening():
        while not all(marker.exists() for marker in markers):
            stop.check()
            time.sleep(0.2)
    result = evaluate(request, listener)
    for marker in markers:
        marker.unlink(missing_ok=True)
    return result
