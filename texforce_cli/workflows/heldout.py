"""The held-out pairs: prompts and seeds that training never sees, drawn by the base once and by the tuned model again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from texforce_cli.config import DIVERSITY
from texforce_cli.core.comparison import diversity
from texforce_cli.core.statistics import Interval, paired_interval
from texforce_cli.devices import if_room
from texforce_cli.diffusion.policy import Policy
from texforce_cli.diffusion.sampler import draw, too_full
from texforce_cli.errors import TexforceError
from texforce_cli.prompts import PromptSet
from texforce_cli.prompts.heldout import heldout_pairs, repeated
from texforce_cli.report.pictures import before_after, save_png
from texforce_cli.rewards.terms import RewardSet
from texforce_cli.team import Team
from texforce_cli.workflows.events import Evaluation, Watched

Floats = NDArray[np.float64]


class HeldOut:
    """The pairs of one run with what the base makes of them."""

    def __init__(
        self,
        prompts: PromptSet,
        count: int,
        policy: Policy,
        rewards: RewardSet,
        *,
        batch: int,
        steps: int | None = None,
        watch: Sequence[RewardSet] = (),
        diversity_at: int | None = None,
        team: Team | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.prompts, self.seeds = heldout_pairs(prompts, count)
        self.unseen = count // 2 if prompts.unseen else 0
        self.policy, self.rewards, self.batch, self.team = policy, rewards, batch, team or Team()
        self._room, self.warn = batch, warn
        self._halved: list[str] = []
        self.steps = steps or policy.denoising.steps
        with policy.in_steps(self.steps):  # too many of them are told at once
            pass
        self._judges = {str(one): one for one in watch}
        self.watched = list(self._judges)
        """What is measured beside the reward, by name."""
        if diversity_at is not None:
            self.watched.insert(diversity_at, DIVERSITY)
        self._repeated = repeated(self.prompts) if DIVERSITY in self.watched else []
        self.history: list[Evaluation] = []
        self._base_images: NDArray[np.uint8] | None = None
        self._base_rewards: Floats = np.empty(0)
        self._base_watched: dict[str, Floats] = {}
        self._images: NDArray[np.uint8] | None = None

    def __bool__(self) -> bool:
        return bool(self.prompts)

    def measure_base(self, progress: Callable[[int, int], None]) -> None:
        """Draw and score the pairs with the base model."""
        if not self or self.policy.adapter is None:
            return
        with self.policy.adapter.disabled():
            self._base_images, self._base_rewards, self._base_watched = self._draw(progress)

    def measure(self, epoch: int, images: int, progress: Callable[[int, int], None]) -> Evaluation:
        """Draw and score the pairs with the weights as they are, compared with the base.

        An epoch that is measured already is drawn for its pictures alone: what was measured stays.
        """
        self._images, rewards, watched = self._draw(progress)
        for known in self.history:
            if known.epoch == epoch:
                return known
        base = self._base_rewards
        split = len(rewards) - self.unseen
        evaluation = Evaluation(
            epoch=epoch,
            images=images,
            mean=float(rewards.mean()),
            base_mean=float(base.mean()),
            difference=_paired(rewards, base),
            seen=_paired(rewards[:split], base[:split]) if split > 1 else None,
            unseen=_paired(rewards[split:], base[split:]) if self.unseen > 1 else None,
            rewards=tuple(rewards.tolist()),
            base_rewards=tuple(base.tolist()),
            watched={name: _watched(name, watched[name], self._base_watched[name]) for name in self.watched},
        )
        self.history.append(evaluation)
        return evaluation

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take up the measurements of an earlier part of the run."""
        for row in rows:
            intervals = {
                name: Interval(**row[name]) if row[name] else None for name in ("difference", "seen", "unseen")
            }
            lists = {name: tuple(row[name]) for name in ("rewards", "base_rewards")}
            watched = {
                name: Watched(**{**value, "difference": Interval(**value["difference"])})
                for name, value in row.get("watched", {}).items()
            }
            self.history.append(Evaluation(**{**row, **intervals, **lists, "watched": watched}))

    def fallen(self, patience: int) -> str | None:
        """What is watched first, where it was surely below the base in the last `patience` measurements."""
        last = self.history[-patience:] if patience and self.watched else []
        name = next(iter(self.watched), "")
        if len(last) == patience > 0 and all(e.watched[name].difference.high < 0 for e in last):
            return name
        return None

    def save_pictures(
        self, path: Path, count: int, title: str, *, before_label: str = "base", after_label: str = "tuned"
    ) -> None:
        """The first pairs of seen and of unseen prompts, the base above the tuned model."""
        if self._images is None or self._base_images is None:
            return
        split = len(self.prompts) - self.unseen
        shown = [*range(min(count, split)), *range(split, split + min(count, self.unseen))]
        picture = before_after(
            [Image.fromarray(self._base_images[i]) for i in shown],
            [Image.fromarray(self._images[i]) for i in shown],
            [self.prompts[i].text for i in shown],
            before_label=before_label,
            after_label=after_label,
            title=title,
            columns=count,
        )
        save_png(path, picture, {"title": title})

    def _draw(self, progress: Callable[[int, int], None]) -> tuple[NDArray[np.uint8], Floats, dict[str, Floats]]:
        """All pairs, each process of the team drawing and scoring every n-th batch."""
        self.policy.snapshot_unconditional()
        texts, total = [prompt.text for prompt in self.prompts], len(self.prompts)
        sets = {"": self.rewards, **self._judges}
        parts: dict[int, tuple[NDArray[np.uint8], dict[str, dict[str, Floats]]]] = {}
        for start in range(self.team.rank * self.batch, total, self.team.size * self.batch):
            part = slice(start, min(start + self.batch, total))
            images = self._pictures(texts[part], self.seeds[part])
            batch = images, texts[part], [prompt.metadata for prompt in self.prompts[part]]
            waiting = functools.partial(progress, start - self.team.rank * self.batch, total)
            scored = {name: one.awaited(one.submit(*batch), waiting, self.team.get_on) for name, one in sets.items()}
            parts[start] = images, scored
            progress(min(total, start + (self.team.size - self.team.rank) * self.batch), total)
        found = {start: batch for shared in self.team.each(parts) for start, batch in shared.items()}
        # all have scored, so the owner of lent workers has everything to say, and has counted it
        self.rewards.counts()  # an epoch counts in its own images
        said = [*self._halved, *(text for one in sets.values() for text in one.warnings())]
        for text in dict.fromkeys(text for texts in self.team.each(said) for text in texts):
            self.warn(text)
        self._halved = []
        drawn, scores = zip(*(found[start] for start in sorted(found)))
        terms = {
            name: {spec.name: np.concatenate([score[name][spec.name] for score in scores]) for spec in one.specs}
            for name, one in sets.items()
        }
        values = {name: one.weighted(terms[name]) for name, one in self._judges.items()}
        pictures = np.concatenate(drawn)
        if DIVERSITY in self.watched:  # one value a prompt
            values[DIVERSITY] = np.array([diversity(list(pictures[places])) for places in self._repeated])
        return pictures, self.rewards.weighted(self.rewards.filled(terms[""])), values

    def _pictures(self, texts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        """As many at once as there is room for."""
        drawn: NDArray[np.uint8] | None = None
        while drawn is None:
            images = min(self._room, len(texts))
            with self.policy.in_steps(self.steps):
                drawn = if_room(functools.partial(draw, self.policy, texts, seeds, batch=images), last=images == 1)
            if drawn is None:
                self._room = images // 2
                self._halved.append(too_full(self.policy.device, images, self._room))
        return drawn


def _watched(name: str, after: Floats, before: Floats) -> Watched:
    """Over the pairs of which both pictures have a score.

    Raises:
        TexforceError: there are fewer than two.
    """
    both = np.isfinite(after) & np.isfinite(before)
    if both.sum() < 2:
        raise TexforceError(
            f"the watched reward '{name}' has scored {both.sum()} of {len(both)} held-out pairs",
            "see the warnings before; --resume goes on when that is mended",
        )
    return Watched(float(after[both].mean()), float(before[both].mean()), _paired(after[both], before[both]))


def _paired(after: Floats, before: Floats) -> Interval:
    return paired_interval(after.tolist(), before.tolist())
