"""From scores to statements: means with intervals, paired differences, win rates; as JSON, CSV, and what the page shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from texforce_cli.core.comparison import ByPrompt, compare, holm, interval, unit_means, win_matrix
from texforce_cli.files import finite, read_json, write_csv, write_json
from texforce_cli.report.page import Row
from texforce_cli.workflows.evaluation.pictures import Item


@dataclass(frozen=True)
class MetricAbout:
    """How to read a metric. Not `by_picture`: it has one value a prompt."""

    name: str
    unit: str
    higher_is_better: bool
    summary: str
    version: str
    by_picture: bool = True


@dataclass(frozen=True)
class Summary:
    """Everything that was found. `unpaired` counts, for each metric, the (prompt, seed) cells that lack a value in some
    variant, or in every one, and therefore left all of them; of diversity, prompts. `missing` says what lacks, and why."""

    baseline: str
    variants: tuple[str, ...]
    metrics: tuple[MetricAbout, ...]
    rows: tuple[Row, ...]
    wins: Mapping[str, Mapping[str, Mapping[str, float]]]
    unpaired: Mapping[str, int]
    missing: tuple[Mapping[str, Any], ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def left_out(self) -> list[str]:
        """The counts of `unpaired`, for people."""
        cells = {metric.name: "pictures" if metric.by_picture else "prompts" for metric in self.metrics}
        return [
            f"{name}: {count} {cells[name]} of each variant are left out, because a variant lacks one, or its score"
            for name, count in self.unpaired.items()
            if count
        ]

    def plain(self) -> dict[str, Any]:
        """Plain values, in order, without a time: the same evaluation gives the same bytes. null is what is not finite."""
        document = {
            "texforce_eval": 1,
            **self.about,
            "baseline": self.baseline,
            "metrics": [asdict(metric) for metric in self.metrics],
            "rows": [asdict(row) for row in self.rows],
            "wins": self.wins,
            "unpaired": self.unpaired,
            "missing": list(self.missing),
        }
        return {key: finite(value) for key, value in document.items()}


Values = Mapping[str, Mapping[Item, float]]
"""Variant -> cell -> value, of one metric."""


def summarise(
    baseline: str,
    items: Sequence[Item],
    drawn: Sequence[Item],
    unseen: frozenset[str],
    values: Sequence[tuple[MetricAbout, Values]],
    missing: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    identical: Collection[str] = (),
) -> Summary:
    """Compare every variant with the baseline by every metric, over all prompts and over each group of them. Of `items` every
    variant has those that are `drawn`; those of the variants `identical` are the baseline's."""
    rows: list[Row] = []
    wins: dict[str, dict[str, dict[str, float]]] = {}
    unpaired: dict[str, int] = {}
    groups = groups_of(items, unseen)
    variants = tuple(values[0][1]) if values else ()
    for metric, by_variant in values:
        asked = len(items) if metric.by_picture else len(groups["all"])
        shared = [item for item in items if all(item in found for found in by_variant.values())]
        unpaired[metric.name] = asked - len(shared)
        if shared:
            wins[metric.name] = win_matrix(
                {name: _by_prompt(found, shared) for name, found in by_variant.items()},
                higher_is_better=metric.higher_is_better,
            )
        for group, members in groups.items():
            cells = [item for item in shared if item.text in members]
            if cells:
                texts = {item.text for item in cells}
                pictures = cells if metric.by_picture else [item for item in drawn if item.text in texts]
                rows += _rows(group, metric, by_variant, baseline, cells, len(pictures), identical)
    return Summary(
        baseline, variants, tuple(m for m, _ in values), tuple(adjusted(rows)), wins, unpaired, tuple(missing), about
    )


def write_summary(summary: Summary, folder: Path) -> None:
    """summary.json and summary.csv."""
    write_json(folder / "summary.json", summary.plain())
    marks = {about["name"]: set(about["in_sample"]) for about in summary.about.get("variants", ())}
    rows = [[*asdict(row).values(), int(row.metric in marks.get(row.variant, ()))] for row in summary.rows]
    write_csv(folder / "summary.csv", [[*Row.__dataclass_fields__, "in_sample"], *rows])


def remembered(folder: Path, metric: str) -> MetricAbout | None:
    """What the summary in a folder says of a metric; None where it says nothing that can be used."""
    try:
        found = [MetricAbout(**about) for about in read_json(folder / "summary.json")["metrics"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    kinds = [str, str, bool, str, str, bool]
    return next(
        (about for about in found if about.name == metric and list(map(type, vars(about).values())) == kinds), None
    )


def write_scores(
    values: Sequence[tuple[MetricAbout, Values]], items: Sequence[Item], unseen: frozenset[str], folder: Path
) -> None:
    """scores.csv: every value that a picture has; of diversity one a prompt, without a seed."""
    rows = [
        [
            variant,
            item.text,
            item.seed if metric.by_picture else None,
            "unseen" if item.text in unseen else "seen",
            ", ".join(item.categories),
            metric.name,
            found[item],
        ]
        for metric, by_variant in values
        for variant, found in by_variant.items()
        for item in items
        if item in found
    ]
    write_csv(folder / "scores.csv", [["variant", "prompt", "seed", "split", "category", "metric", "value"], *rows])


def groups_of(items: Sequence[Item], unseen: frozenset[str]) -> dict[str, set[str]]:
    """Group -> texts: all; seen and unseen where there are both; categories but one that is all there is."""
    texts = {item.text for item in items}
    groups = {"all": texts}
    if texts & unseen and texts - unseen:
        groups |= {"seen": texts - unseen, "unseen": texts & unseen}
    categories: dict[str, set[str]] = {}
    for item in items:
        for category in item.categories:
            categories.setdefault(category, set()).add(item.text)
    if len(categories) > 1 or texts not in categories.values():
        taken = ("all", "seen", "unseen")
        groups |= {f"category {n}" if n in taken else n: members for n, members in sorted(categories.items())}
    return groups


def _by_prompt(found: Mapping[Item, float], cells: Sequence[Item]) -> dict[str, list[float]]:
    result: dict[str, list[float]] = {}
    for item in cells:
        result.setdefault(item.text, []).append(found[item])
    return result


def _rows(
    group: str,
    metric: MetricAbout,
    values: Values,
    baseline: str,
    cells: Sequence[Item],
    pictures: int,
    identical: Collection[str],
) -> list[Row]:
    own = {variant: _by_prompt(found, cells) for variant, found in values.items()}
    return [
        row_of(
            group,
            variant,
            metric,
            found,
            None if variant == baseline else own[baseline],
            pictures,
            identical=variant in identical,
        )
        for variant, found in own.items()
    ]


def row_of(
    group: str,
    variant: str,
    metric: MetricAbout,
    values: ByPrompt,
    baseline: ByPrompt | None,
    pictures: int,
    *,
    identical: bool = False,
) -> Row:
    """The mean of a variant's values, and how it compares to the baseline's; None: it is the baseline."""
    mean = interval(unit_means(values).tolist())
    row = Row(
        group=group,
        variant=variant,
        metric=metric.name,
        mean=mean.mean,
        low=mean.low,
        high=mean.high,
        label="for this prompt only" if len(values) == 1 else "",
        prompts=len(values),
        pictures=pictures,
    )
    if baseline is None:
        return row
    against = compare(values, baseline, higher_is_better=metric.higher_is_better, identical=identical)
    return replace(
        row,
        difference=against.difference.mean,
        difference_low=against.difference.low,
        difference_high=against.difference.high,
        win_rate=against.win_rate,
        p=against.p,
        effect=against.effect,
        detectable=against.detectable,
    )


def adjusted(rows: Sequence[Row]) -> list[Row]:
    """Holm's adjustment over all comparisons of a group: every variant with every metric."""
    corrected: dict[int, float] = {}
    for group in dict.fromkeys(row.group for row in rows):
        tested = [(index, row.p) for index, row in enumerate(rows) if row.group == group and row.p is not None]
        corrected |= dict(zip((index for index, _ in tested), holm([p for _, p in tested])))
    return [replace(row, p_holm=corrected.get(index)) for index, row in enumerate(rows)]
