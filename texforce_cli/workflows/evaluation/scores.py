"""The scores of an evaluation: kept by picture, prompt and version of the reward, so that nothing is scored twice."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from texforce_cli.core.comparison import diversity
from texforce_cli.errors import TexforceError
from texforce_cli.files import write_error
from texforce_cli.report.pictures import read_picture
from texforce_cli.rewards.isolation import WorkerSettings
from texforce_cli.rewards.registry import Registry, RewardInfo
from texforce_cli.rewards.terms import RewardSet, TermSpec, find
from texforce_cli.workflows.evaluation.pictures import Item

DIVERSITY = "diversity"
_DIVERSITY_VERSION = "1"


@dataclass(frozen=True)
class Metric:
    """A reward as a metric: its name, what it was made with, and how to read it."""

    spec: TermSpec
    info: RewardInfo

    @property
    def name(self) -> str:
        """The reward's name."""
        return self.spec.name

    @property
    def version(self) -> str:
        """What its values depend on: the version of the package that it comes from, and its options."""
        options = ",".join(f"{key}={value}" for key, value in sorted(self.spec.options.items()))
        return f"{self.info.origin} {self.info.version}" + (f" {options}" if options else "")


class ScoreFile:
    """An append-only file of scores, one JSON object a line; a torn last line is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[tuple[str, str, str, str], float] = {}
        if not path.is_file():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with path.open("r+b") as handle:
                handle.truncate(len(whole))
        for line in whole.decode("utf-8", "replace").split("\n"):
            try:
                row = json.loads(line)
                key = (row["picture"], row["prompt"], row["metric"], row["version"])
                value = float(row["value"])
            except (ValueError, KeyError, TypeError):
                continue
            if math.isfinite(value):
                self._values[key] = value

    def get(self, picture: str, prompt: str, metric: str, version: str) -> float | None:
        """A score that is known."""
        return self._values.get((picture, prompt, metric, version))

    def add(self, rows: Iterable[tuple[str, str, str, str, float]]) -> None:
        """Append (picture, prompt, metric, version, value), on the disk before this returns.

        Raises:
            TexforceError: the disk is full or read-only.
        """
        lines = []
        for picture, prompt, metric, version, value in rows:
            self._values[picture, prompt, metric, version] = value
            row = {"picture": picture, "prompt": prompt, "metric": metric, "version": version, "value": value}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as handle:
                handle.write("".join(lines).encode("utf-8", "surrogatepass"))
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise write_error(self.path, error) from error


def metrics_of(specs: Sequence[TermSpec], registry: Registry) -> list[Metric]:
    """The metrics that were asked for.

    Raises:
        UsageError: an unknown name.
    """
    return [Metric(spec, find(spec, registry)) for spec in specs]


def score_pictures(
    scores: ScoreFile,
    metric: Metric,
    registry: Registry,
    variants: Mapping[str, Mapping[Item, tuple[Path, str]]],
    *,
    batch: int,
    workers: WorkerSettings | None,
    failed: Callable[[str, Item, str], None],
    progress: Callable[[int, int], None],
    check: Callable[[], None],
) -> None:
    """Score what has no score yet. A picture that cannot be read or scored is told to `failed`, and the others go on.

    Raises:
        TexforceError: the reward cannot be made.
    """
    cells = [(name, item, path, sha) for name, found in variants.items() for item, (path, sha) in found.items()]
    batches = [cells[start : start + batch] for start in range(0, len(cells), batch)]
    todo = [
        part
        for part in batches
        if any(scores.get(sha, item.text, metric.name, metric.version) is None for _, item, _, sha in part)
    ]
    done = sum(map(len, batches)) - sum(map(len, todo))
    progress(done, len(cells))
    if not todo:
        return
    rewards = RewardSet([metric.spec], registry, workers=workers)
    try:
        for part in todo:
            check()
            rows = []
            for (name, item, sha), value in _scored(rewards, metric.name, part, failed):
                del name
                rows.append((sha, item.text, metric.name, metric.version, value))
            scores.add(rows)
            done += len(part)
            progress(done, len(cells))
    finally:
        rewards.close()


Cell = tuple[str, Item, Path, str]


def _scored(
    rewards: RewardSet, metric: str, cells: Sequence[Cell], failed: Callable[[str, Item, str], None]
) -> list[tuple[tuple[str, Item, str], float]]:
    """Those of a batch that could be scored: together where their sizes allow it, one by one where that fails."""
    pictures: dict[tuple[int, ...], list[tuple[Cell, NDArray[np.uint8]]]] = {}
    for cell in cells:
        try:
            picture = read_picture(cell[2])
        except TexforceError as error:
            failed(cell[0], cell[1], error.message)
            continue
        pictures.setdefault(picture.shape, []).append((cell, picture))
    result = []
    for group in pictures.values():
        try:
            values = _values(rewards, metric, group)
        except TexforceError as error:
            if len(group) == 1:
                failed(group[0][0][0], group[0][0][1], error.message)
                continue
            values = []
            for one in group:
                try:
                    values += _values(rewards, metric, [one])
                except TexforceError as alone:
                    failed(one[0][0], one[0][1], alone.message)
                    values.append(math.nan)
        result += [((c[0], c[1], c[3]), value) for (c, _), value in zip(group, values) if math.isfinite(value)]
    return result


def _values(rewards: RewardSet, metric: str, group: Sequence[tuple[Cell, NDArray[np.uint8]]]) -> list[float]:
    images = np.stack([picture for _, picture in group])
    prompts = [cell[1].text for cell, _ in group]
    metadata: list[Mapping[str, Any]] = [cell[1].metadata for cell, _ in group]
    return [float(value) for value in rewards.score(images, prompts, metadata)[metric]]


def measure_diversity(
    scores: ScoreFile, pictures: Mapping[Item, tuple[Path, str]], check: Callable[[], None]
) -> dict[str, float]:
    """Prompt -> how much its pictures differ from seed to seed, for prompts with two pictures of one size or more."""
    by_prompt: dict[str, list[tuple[Path, str]]] = {}
    for item, found in pictures.items():
        by_prompt.setdefault(item.text, []).append(found)
    result = {}
    for prompt, files in by_prompt.items():
        check()
        key = hashlib.sha256(" ".join(sha for _, sha in files).encode()).hexdigest()
        value = scores.get(key, prompt, DIVERSITY, _DIVERSITY_VERSION)
        if value is None:
            try:
                arrays = [read_picture(path) for path, _ in files]
            except TexforceError:
                continue  # it is told where the picture is scored
            if len(arrays) < 2:
                continue
            value = diversity(arrays)
            scores.add([(key, prompt, DIVERSITY, _DIVERSITY_VERSION, value)])
        result[prompt] = value
    return result
