"""What an evaluation would draw and score."""

from __future__ import annotations

from typing import Any

from texforce_cli.devices import resolve_device
from texforce_cli.errors import UsageError
from texforce_cli.files import placed
from texforce_cli.prompts.fetched import NotFetched, least_count
from texforce_cli.rewards.registry import load_registry
from texforce_cli.rewards.terms import parse_terms
from texforce_cli.workflows.drawing import denoising_for, source_for
from texforce_cli.workflows.evaluation.request import EvalRequest, prompts_of, recalled
from texforce_cli.workflows.evaluation.scores import metrics_of
from texforce_cli.workflows.evaluation.variants import check_variants
from texforce_cli.workflows.evaluation.votes import check_votes
from texforce_cli.workflows.loras import training_of, weights_of


def plan_eval(request: EvalRequest) -> dict[str, Any]:
    """What would be drawn and scored, as plain values; what is not there yet (LoRAs, weights, prompts to fetch) is
    named, no weights are loaded.

    Raises:
        UsageError, TexforceError: as `evaluate`, but for what is not there yet.
    """
    request = recalled(request)
    baseline = check_variants(request.variants, request.baseline)
    check_votes(request)
    resolve_device(request.device)
    metrics = metrics_of(parse_terms(request.metrics, request.metric_options), load_registry())
    for metric in metrics:
        metric.info.check(metric.spec.arguments)
    absent: list[str] = []
    try:
        prompts = prompts_of(request)
        name, count = prompts.name, len({prompt.text for prompt in (*prompts.seen, *prompts.unseen)})
    except NotFetched:
        absent.append(request.prompts)
        name, count = request.prompts, least_count(request.prompts)
    pictures = count * len(set(request.seeds))
    trained: dict[str, dict[str, Any]] = {}
    for variant in request.variants:
        for text in variant.loras:
            try:
                trained.setdefault(variant.name, training_of(text, allow_pickle=request.allow_pickle))
            except UsageError:
                absent.append(text)
        for component, path in variant.replaced.items():
            if placed(path):
                weights_of(component, path, allow_pickle=request.allow_pickle)
            else:
                absent.append(path)
    first = next((about for about in trained.values() if about), {})
    variants = []
    for variant in request.variants:
        about: dict[str, Any] = {"name": variant.name, "description": variant.description, "pictures": pictures}
        if not variant.images:
            source = source_for(variant.model, trained.get(variant.name) or first, request.device)
            denoising = denoising_for(request, first, source.family)
            branches = 1 if denoising.guidance == 1 else 2
            about |= {"model": source.name, "steps": denoising.steps, "guidance": denoising.guidance}
            about["unet_calls"] = pictures * denoising.steps * branches
        variants.append(about)
    return {
        "baseline": baseline,
        "prompts": {"name": name, "count": count},
        "seeds": list(request.seeds),
        "variants": variants,
        "metrics": [metric.name for metric in metrics],
        "not_there_yet": sorted(set(absent)),
    }
