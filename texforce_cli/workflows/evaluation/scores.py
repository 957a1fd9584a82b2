"""The scores of an evaluation: kept by pixels, prompt and version of the reward, so that nothing is scored twice."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from texforce_cli.config import DIVERSITY
from texforce_cli.core.comparison import diversity
from texforce_cli.devices import release
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import Lines, from_json
from texforce_cli.report.pictures import read_picture
from texforce_cli.rewards.isolation import WorkerSettings
from texforce_cli.rewards.registry import Registry, RewardInfo
from texforce_cli.rewards.terms import RewardSet, TermSpec, find
from texforce_cli.workflows.evaluation.pictures import Found, Item
from texforce_cli.workflows.evaluation.summary import remembered
from texforce_cli.workflows.evaluation.votes import VOTES

_DIVERSITY_VERSION = "1"
_TAKEN = (DIVERSITY, VOTES)

_WITHOUT_METADATA = re.compile(r" \{[0-9a-f]{16}\}$")

Key = tuple[str, str, str, str]
"""Hash of the pixels, prompt, metric, version."""


@dataclass(frozen=True)
class Metric:
    """A reward as a metric: its name, what it was made with, and how to read it."""

    spec: TermSpec
    info: RewardInfo

    @property
    def name(self) -> str:
        """The reward's name."""
        return self.spec.name

    def version(self, scores: ScoreFile, *, installed: bool = True) -> str:
        """What its values depend on: the version of its package and code, its options, and the contents of files that these name.

        Where these files are gone, it is the version that was scored with last; so it is where nothing was scored with the
        package that is `installed`, and that is not asked for.
        """
        # a comma within a value is doubled: `a=1,b=2` is not two options
        options = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in sorted(self.spec.options.items()))
        options = f" {options}" if options else ""
        files = f" [{found}]" if (found := self.spec.files) else ""
        known = scores.versions(self.name)
        exact = f"{self.info.origin} {self.info.exact_version}{options}{files}"
        if exact in known:
            return exact
        package = re.escape(self.info.exact_version) if installed else r"\S*"
        like = rf"{re.escape(self.info.origin)} {package}{re.escape(options)}"
        like += re.escape(files) or r"( \[[0-9a-f]{16}\])?"
        return next((version for version in reversed(known) if re.fullmatch(like, version)), exact)


def _hash(value: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(value), sort_keys=True, default=str).encode("utf-8")).hexdigest()[:16]


class ScoreFile:
    """An append-only file of scores, one JSON object a line.

    `batch` says which of how many a score is of those that were made together. Where a kill or a full disk cut these off, none
    of them counts: with other neighbours the rest would differ in its last bits.

    Raises:
        TexforceError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._values: dict[Key, float] = {}
        self._versions: dict[str, dict[str, None]] = {}
        self._lines, lines = Lines.opened(path)
        together: list[tuple[Key, float]] = []
        for line in lines:
            try:
                row = from_json(line.decode("utf-8", "replace"))
                key = (row["picture"], row["prompt"], row["metric"], row["version"])
                value = float(row["value"])
                number, count = row.get("batch", (1, 1))  # earlier versions of texforce wrote none
            except (ValueError, KeyError, TypeError):
                continue
            if number == 1:
                together = []
            if math.isfinite(value) and all(isinstance(part, str) for part in key):
                together.append((key, value))
            if number == count:
                self._learn(together)

    def _learn(self, scores: Iterable[tuple[Key, float]]) -> None:
        for key, value in scores:
            self._values[key] = value
            of_metric = self._versions.setdefault(key[2], {})
            version = _WITHOUT_METADATA.sub("", key[3])
            of_metric.pop(version, None)
            of_metric[version] = None

    def get(self, picture: str, prompt: str, metric: str, version: str) -> float | None:
        """A score that is known."""
        return self._values.get((picture, prompt, metric, version))

    def versions(self, metric: str) -> list[str]:
        """Those of a metric that the file knew when it was opened, in the order of their last scores."""
        return list(self._versions.get(metric, ()))

    def adopt(self, key: Key, earlier: Key) -> None:
        """Know a score by `key` that the file has by `earlier`, where nothing is known by `key`."""
        if key not in self._values and earlier in self._values:
            self._values[key] = self._values[earlier]

    def add(self, rows: Iterable[tuple[str, str, str, str, float]]) -> None:
        """Append (picture, prompt, metric, version, value) of scores that were made together, on the disk before this returns.

        Raises:
            TexforceError: the disk is full or read-only.
        """
        together = list(rows)
        lines = []
        for number, (picture, prompt, metric, version, value) in enumerate(together, 1):
            self._values[picture, prompt, metric, version] = value
            row = {"picture": picture, "prompt": prompt, "metric": metric, "version": version, "value": value}
            line = json.dumps({**row, "batch": [number, len(together)]}, ensure_ascii=False)
            lines.append(line.encode("utf-8", "surrogatepass"))
        self._lines.append(*lines)


def metrics_of(specs: Sequence[TermSpec], registry: Registry, folder: Path | None = None) -> list[Metric]:
    """The metrics that were asked for; one that is not installed is what the summary in `folder` says of it.

    Raises:
        UsageError: an unknown name, one that a plugin cannot have here, or a weight.
    """
    for spec in specs:
        if spec.name in _TAKEN:
            raise UsageError(f"no metric can be called '{spec.name}': eval has that itself", "leave it out")
        if spec.weight != 1:
            raise UsageError(f"the metric '{spec}' has a weight", f"metrics are not added up: --metric {spec.name}")
    return [Metric(spec, _info(spec, registry, folder)) for spec in specs]


def _info(spec: TermSpec, registry: Registry, folder: Path | None) -> RewardInfo:
    try:
        return find(spec, registry)
    except UsageError:
        if folder is None or (known := remembered(folder, spec.name)) is None:
            raise
        return RewardInfo(
            spec.name,
            factory="",
            origin=known.version.partition(" ")[0],
            version="",
            summary=known.summary,
            higher_is_better=known.higher_is_better,
            unit=known.unit,
        )


def check_metrics(metrics: Sequence[Metric], registry: Registry, scores: ScoreFile, *, make: bool) -> None:
    """What is wrong with the options of metrics that have not scored here yet; to `make` and end each tells of weights that
    are missing, too.

    Raises:
        UsageError, TexforceError: as `RewardInfo.check`; where they are made, as `RewardInfo.create`.
    """
    for metric in (one for one in metrics if one.version(scores) not in scores.versions(one.name)):
        if not metric.info.factory:  # not installed, and nothing is scored
            continue
        if make:
            RewardSet([metric.spec], registry).close()
            release()
        else:
            metric.info.check(metric.spec.arguments)


def score_key(metric: str, version: str, item: Item, found: Found) -> Key:
    """What a score is known by; metadata of the prompt, which rewards are given, is a part of the version."""
    about = f" {{{_hash([item.metadata])}}}" if item.metadata else ""
    return found.pixels, item.text, metric, version + about


def known_score(scores: ScoreFile, key: Key, found: Found) -> float | None:
    """The score of a picture; files of earlier versions of texforce have it by the hash of the picture's file."""
    scores.adopt(key, (found.sha256, *key[1:]))
    return scores.get(*key)


def score_pictures(
    scores: ScoreFile,
    metric: Metric,
    registry: Registry,
    variants: Mapping[str, Mapping[Item, Found]],
    *,
    batch: int,
    workers: WorkerSettings | None,
    failed: Callable[[str, Item, str], None],
    progress: Callable[[int, int], None],
    check: Callable[[], None],
) -> None:
    """Score what has no score yet; pictures with the same pixels and prompt once, so that they have exactly the same score.

    What cannot be scored is told to `failed`, and the others go on. `workers` must not substitute scores.

    Raises:
        TexforceError: the reward cannot be made.
    """
    version = metric.version(scores)
    cells: dict[Key, list[Cell]] = {}
    for name, pictures in variants.items():
        for item, found in pictures.items():
            key = score_key(metric.name, version, item, found)
            known_score(scores, key, found)
            cells.setdefault(key, []).append(Cell(name, item, found.path))
    keys = list(cells)
    # cut where they always are: what a reward computes may depend, in its last bits, on who is scored together
    batches = [keys[start : start + batch] for start in range(0, len(keys), batch)]
    todo = [part for part in ([key for key in whole if scores.get(*key) is None] for whole in batches) if part]
    done = len(keys) - sum(map(len, todo))
    progress(done, len(keys))
    if not todo:
        return

    def lacks(key: Key, why: str) -> None:
        for cell in cells[key]:
            failed(cell.variant, cell.item, why)

    rewards = RewardSet([metric.spec], registry, workers=workers)
    try:
        for part in todo:
            check()
            scored = _scored(rewards, metric.name, {key: cells[key][0] for key in part}, lacks)
            scores.add((*key, value) for key, value in scored.items())
            done += len(part)
            progress(done, len(keys))
    finally:
        rewards.close()


@dataclass(frozen=True)
class Cell:
    """A picture to score."""

    variant: str
    item: Item
    path: Path


def _scored(
    rewards: RewardSet, metric: str, cells: Mapping[Key, Cell], failed: Callable[[Key, str], None]
) -> dict[Key, float]:
    """Those of a batch that could be scored: together where their sizes allow it, one by one where that fails."""
    sizes: dict[tuple[int, ...], dict[Key, tuple[Cell, NDArray[np.uint8]]]] = {}
    for key, cell in cells.items():
        try:
            picture = read_picture(cell.path)
        except TexforceError as error:
            failed(key, error.message)
            continue
        sizes.setdefault(picture.shape, {})[key] = (cell, picture)
    result: dict[Key, float] = {}
    for group in sizes.values():
        try:
            result |= _values(rewards, metric, group, failed)
        except TexforceError as error:
            if len(group) == 1:
                failed(next(iter(group)), error.message)
                continue
            for key, one in group.items():
                try:
                    result |= _values(rewards, metric, {key: one}, failed)
                except TexforceError as alone:
                    failed(key, alone.message)
    return result


def _values(
    rewards: RewardSet,
    metric: str,
    group: Mapping[Key, tuple[Cell, NDArray[np.uint8]]],
    failed: Callable[[Key, str], None],
) -> dict[Key, float]:
    images = np.stack([picture for _, picture in group.values()])
    prompts = [cell.item.text for cell, _ in group.values()]
    metadata: list[Mapping[str, Any]] = [cell.item.metadata for cell, _ in group.values()]
    values = dict(zip(group, map(float, rewards.score(images, prompts, metadata)[metric])))
    said = rewards.warnings()
    for key, value in values.items():
        if not math.isfinite(value):
            failed(key, next((text for text in said if f"'{key[1][:80]}'" in text), "it could not be scored"))
    return {key: value for key, value in values.items() if math.isfinite(value)}


def measure_diversity(scores: ScoreFile, pictures: Mapping[Item, Found], check: Callable[[], None]) -> dict[str, float]:
    """Prompt -> how much its pictures differ from seed to seed, for prompts with two pictures of one size or more."""
    by_prompt: dict[str, list[Found]] = {}
    for item, found in pictures.items():
        by_prompt.setdefault(item.text, []).append(found)
    result = {}
    for prompt, files in by_prompt.items():
        check()
        key = hashlib.sha256(" ".join(file.pixels for file in files).encode()).hexdigest()
        value = scores.get(key, prompt, DIVERSITY, _DIVERSITY_VERSION)
        if value is None:
            try:
                arrays = [read_picture(file.path) for file in files]
            except TexforceError:
                continue
            if len(arrays) < 2:
                continue
            value = diversity(arrays)
            scores.add([(key, prompt, DIVERSITY, _DIVERSITY_VERSION, value)])
        result[prompt] = value
    return result
