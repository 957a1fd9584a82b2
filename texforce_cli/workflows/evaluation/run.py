"""The order of an evaluation: pictures, scores, summary and report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from texforce_cli.config import DIVERSITY
from texforce_cli.devices import claim, resolve_device
from texforce_cli.errors import UsageError
from texforce_cli.files import held
from texforce_cli.judging.votes import Vote
from texforce_cli.prompts import PromptSet
from texforce_cli.report.page import Page, PageMetric, PagePrompt, PageVariant, Picture, pictures_hash, write_page
from texforce_cli.report.verdicts import ranking_tabs
from texforce_cli.rewards.builtin import with_negations
from texforce_cli.rewards.isolation import WorkerSettings
from texforce_cli.rewards.registry import Registry, load_registry
from texforce_cli.rewards.terms import parse_terms
from texforce_cli.workflows.drawing import caveats
from texforce_cli.workflows.evaluation.draw import draw, recipes, settings_of
from texforce_cli.workflows.evaluation.pictures import Found, Item, collect, comparability, items_of
from texforce_cli.workflows.evaluation.request import EvalRequest, prompts_of, recalled, record, rewards_trained_on
from texforce_cli.workflows.evaluation.scores import (
    Metric,
    ScoreFile,
    check_metrics,
    known_score,
    measure_diversity,
    metrics_of,
    score_key,
    score_pictures,
)
from texforce_cli.workflows.evaluation.summary import (
    MetricAbout,
    Summary,
    Values,
    adjusted,
    summarise,
    write_scores,
    write_summary,
)
from texforce_cli.workflows.evaluation.variants import check_variants
from texforce_cli.workflows.evaluation.votes import check_votes, count_votes, votes_about
from texforce_cli.workflows.events import Listener, Note, Progressed, Warned, silent
from texforce_cli.workflows.stopping import StopRequest

Pictures = Mapping[str, Mapping[Item, Found]]
"""Variant -> cell -> the picture, of those that can be read."""
Drawing = Callable[[EvalRequest, Sequence[Item], StopRequest], None]
_REWARD_TIMEOUT = 300.0
"""Seconds that an isolated metric may take for a batch."""


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


def evaluate(request: EvalRequest, listener: Listener = silent, *, beforehand: Drawing | None = None) -> EvalResult:
    """Run the stages that were asked for; what earlier runs left in the folder is used.

    `beforehand` may draw pictures, once the folder is held; what it leaves out is drawn here.

    Raises:
        UsageError: nothing to compare, unknown names, contradicting options.
        TexforceError: a model, LoRA or metric that cannot be used, a folder that cannot be written or that another
            evaluation works in.
        Interrupted: asked to stop; what was finished is kept.
    """
    request = recalled(request)
    check_votes(request)
    baseline = check_variants(request.variants, request.baseline)
    registry = load_registry()
    prompts = prompts_of(request)
    folder = request.out if request.stage == "report" else None
    metrics = metrics_of(parse_terms(request.metrics, request.metric_options), registry, folder)
    if not (metrics or request.votes or ranking_tabs(request.out)) and request.stage != "images":
        raise UsageError("there is no metric", "add --metric brightness, or another of: texforce rewards")
    items = items_of([*prompts.seen, *prompts.unseen], request.seeds)
    draws = request.stage in ("all", "images")
    missing = _Missing()
    stop = StopRequest()
    # all that can be wrong with the request is told before the folder remembers it, and before hours of drawing
    trained = rewards_trained_on(request)
    to_draw = recipes(request, to_draw=True) if draws else []
    with stop.listening(), held(request.out):
        if request.stage != "report" and request.device != "auto":
            claim(str(resolve_device(request.device)))  # nothing else has, where all pictures are there
        scores = ScoreFile(request.out / "scores.jsonl")
        check_metrics(metrics, registry, scores, make=request.stage == "all")
        if request.recorded:
            record(request, trained, prompts)
        for sentence in dict.fromkeys(text for one in to_draw for text in caveats(request, one.loras)):
            listener(Warned(sentence))
        if draws:
            if beforehand:
                beforehand(request, items, stop)
            draw(request, to_draw, items, listener, stop, failed=missing.note)
        if request.stage == "images":
            for (name, item), why in missing.undrawn.items():
                missing.tell(name, item, why)
            return EvalResult(request.out, None, None, tuple(missing.entries))
        found = collect(request.out, request.variants, items, settings_of(request), missing.tell_picture)
        for sentence in comparability(found):
            listener(Warned(sentence))
        if request.stage != "report":
            for metric in metrics:
                _score(request, metric, registry, scores, found, missing, listener, stop)
        values = [_values(request, metric, scores, found, missing, listener) for metric in metrics]
        shared = [item for item in items if all(item in pictures for pictures in found.values())]
        values += _diversity(request, scores, found, shared, stop)
        unseen = frozenset(prompt.text for prompt in prompts.unseen)
        in_sample = {
            v.name: sorted(with_negations(n for text in v.loras for n in trained[text])) for v in request.variants
        }
        about = _about(request, prompts, in_sample)
        identical = _identical(found, baseline, shared)
        summary = summarise(baseline, items, shared, unseen, values, missing.entries, about, identical)
        page = _page(request, summary, prompts, items, found, values, in_sample)
        if votes := _votes(request, page, listener):
            summary = _with_votes(summary, tuple(found), votes, items, unseen)
            page = _page(request, summary, prompts, items, found, values, in_sample)
        page = replace(page, extra_tabs=ranking_tabs(request.out, pictures_hash(page)))
        write_summary(summary, request.out)
        write_scores(values, items, unseen, request.out)
        listener(Note("writing the report"))
        written = write_page(
            page,
            request.out / "report",
            single_file=request.single_file,
            progress=lambda done, total: listener(Progressed("report", done, total)),
        )
    return EvalResult(request.out, summary, written, tuple(missing.entries))


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
    prompts = prompts_of(request)
    items = items_of([*prompts.seen, *prompts.unseen], request.seeds)
    missing = _Missing()
    found = collect(request.out, request.variants, items, settings_of(request), missing.tell)
    summary = Summary(baseline, tuple(found), (), (), {}, {}, tuple(missing.entries))
    page = _page(request, summary, prompts, items, found, [], {})
    files = {name: {item: (one.path, one.sha256) for item, one in mine.items()} for name, mine in found.items()}
    return Shown(tuple(items), files, page, tuple(map(_sentence, missing.entries)))


@dataclass(frozen=True)
class _Missing:
    """What lacks, one entry a cell and reason; `undrawn` says why a picture was not drawn."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    undrawn: dict[tuple[str, Item], str] = field(default_factory=dict)

    def note(self, variant: str, item: Item, why: str) -> None:
        self.undrawn[variant, item] = why

    def tell(self, variant: str, item: Item, what: str) -> None:
        self.entries.append({"variant": variant, "prompt": item.text, "seed": item.seed, "what": what})

    def tell_picture(self, variant: str, item: Item, what: str) -> None:
        self.tell(variant, item, self.undrawn.get((variant, item), what))


def _score(
    request: EvalRequest,
    metric: Metric,
    registry: Registry,
    scores: ScoreFile,
    found: Pictures,
    missing: _Missing,
    listener: Listener,
    stop: StopRequest,
) -> None:
    score_pictures(
        scores,
        metric,
        registry,
        found,
        batch=request.batch,
        workers=WorkerSettings(_REWARD_TIMEOUT, failures=math.inf, substitute=False),
        failed=lambda variant, item, why: missing.tell(variant, item, f"{metric.name}: {why}"),
        progress=lambda done, total: listener(Progressed(metric.name, done, total)),
        check=stop.check,
    )


def _values(
    request: EvalRequest,
    metric: Metric,
    scores: ScoreFile,
    found: Pictures,
    missing: _Missing,
    listener: Listener,
) -> tuple[MetricAbout, dict[str, dict[Item, float]]]:
    """The scores of a metric, as far as they are known; a report alone takes those of another version of its package, too."""
    info, version = metric.info, metric.version(scores, installed=request.stage != "report")
    if version != metric.version(scores):
        listener(Warned(f"the scores of {metric.name} are those of '{version}', which is not what is installed"))
    values: dict[str, dict[Item, float]] = {name: {} for name in found}
    for name, pictures in found.items():
        for item, one in pictures.items():
            value = known_score(scores, score_key(metric.name, version, item, one), one)
            if value is not None:
                values[name][item] = value
            elif request.stage == "report":
                missing.tell(name, item, f"{metric.name}: not scored")
    return MetricAbout(metric.name, info.unit, info.higher_is_better, info.summary, version), values


def _diversity(
    request: EvalRequest, scores: ScoreFile, found: Pictures, shared: Sequence[Item], stop: StopRequest
) -> list[tuple[MetricAbout, dict[str, dict[Item, float]]]]:
    """Diversity as a metric with one value a prompt, over the pictures that every variant has."""
    if len(set(request.seeds)) < 2:
        return []
    first = {item.text: item for item in reversed(shared)}
    by_variant = {}
    for name, pictures in found.items():
        values = measure_diversity(scores, {item: pictures[item] for item in shared}, stop.check)
        by_variant[name] = {first[text]: value for text, value in values.items()}
    about = MetricAbout(
        DIVERSITY, "", True, "how much the pictures of a prompt differ from seed to seed", "1", by_picture=False
    )
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


def _identical(found: Pictures, baseline: str, items: Sequence[Item]) -> set[str]:
    """The variants of which each picture is the baseline's."""
    return {
        name
        for name, pictures in found.items()
        if all(pictures[item].pixels == found[baseline][item].pixels for item in items)
    }


def _votes(request: EvalRequest, page: Page, listener: Listener) -> list[Vote]:
    """The votes about the pictures of the page. Those about others are left out with a word: pictures are meant to change."""
    pictures, data = {key: picture.sha256 for key, picture in page.pictures.items()}, pictures_hash(page)
    votes: list[Vote] = []
    for path in request.votes:
        try:
            about, lost = votes_about(request, path, pictures, data)
        except UsageError as error:
            if "votes" in request.given:
                raise
            listener(Warned(f"{error.message}; they are left out"))
            continue
        if lost:
            listener(
                Warned(f"{lost} of {lost + len(about)} votes in '{path}' are about other pictures; they are left out")
            )
        votes += about
    return votes


def _with_votes(
    summary: Summary, variants: Sequence[str], votes: Sequence[Vote], items: Sequence[Item], unseen: frozenset[str]
) -> Summary:
    """The summary with what people chose as one more metric."""
    about, rows, wins = count_votes(votes, variants, summary.baseline, items, unseen)
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
    found: Pictures,
    values: Sequence[tuple[MetricAbout, Values]],
    in_sample: Mapping[str, Sequence[str]],
) -> Page:
    unseen = {prompt.text for prompt in prompts.unseen}
    both = bool(unseen) and bool(prompts.seen)
    pictures = {}
    for name, files in found.items():
        for item, one in files.items():
            own = {
                metric.name: by_variant[name][item]
                for metric, by_variant in values
                if metric.by_picture and item in by_variant[name]
            }
            pictures[name, item.prompt_id, item.seed] = Picture(one.path, one.sha256, own)
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
                prompt.categories,
            )
            for key, prompt in shown.items()
        ],
        seeds=list(dict.fromkeys(request.seeds)),
        pictures=pictures,
        rows=summary.rows,
        wins=summary.wins,
        missing=[_sentence(entry) for entry in summary.missing],
        left_out=summary.left_out,
    )


def _sentence(entry: Mapping[str, Any]) -> str:
    return f"{entry['variant']}, seed {entry['seed']}, '{str(entry['prompt'])[:80]}': {entry['what']}"
