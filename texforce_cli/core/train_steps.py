"""Which denoising steps are trained: `first:N`, `random:F`, `window:K` or `all`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TrainSteps:
    """`first` N steps; a `random` share F of them, others for each image (the paper: 0.5); `all`; or a `window` of the first K,
    which are then the only ones of an epoch that draw noise (an approximation, after MixGRPO, Li et al. 2025, arXiv 2507.21802,
    whose window slides; the later a window begins, the less of the reward is decided by its own noise, docs/results.md).
    """

    kind: Literal["first", "random", "window", "all"]
    amount: float = 0

    @classmethod
    def parse(cls, text: str) -> TrainSteps:
        """Raises ValueError with the reason."""
        kind, _, amount = text.partition(":")
        if kind == "all" and not amount:
            return cls("all")
        if kind in ("first", "window") and amount.isascii() and amount.isdigit() and int(amount) > 0:
            return cls(kind, int(amount))  # type: ignore[arg-type]
        if kind == "random" and _is_share(amount):
            return cls("random", float(amount))
        raise ValueError("is not first:N, random:F with 0 < F <= 1, window:K or all")

    def count(self, steps: int) -> int:
        """How many of `steps` stochastic steps an image is trained on."""
        if self.kind == "all":
            return steps
        return max(1, round(self.amount * steps)) if self.kind == "random" else min(int(self.amount), steps)

    def shares(self, steps: int) -> list[float]:
        """The share of images that each of `steps` stochastic steps is trained on, over all draws."""
        count = self.count(steps)
        if self.kind == "random":
            return [count / steps] * steps
        return [float(i < count) for i in range(steps)]

    def choose(self, stochastic: Sequence[int], images: int, rng: np.random.Generator) -> NDArray[Any]:
        """Step indices [K, images] of one pass over the data, among the `stochastic` steps of the epoch's schedule."""
        import numpy as np

        steps, count = np.asarray(stochastic), self.count(len(stochastic))
        if self.kind == "random":
            return np.stack([rng.permutation(steps)[:count] for _ in range(images)], axis=1)
        return np.repeat(steps[:count, None], images, axis=1)

    def window(self, stochastic: Sequence[int]) -> Sequence[int] | None:
        """The steps of an epoch that draw noise, among those of the schedule that do. None: all of them."""
        return stochastic[: self.count(len(stochastic))] if self.kind == "window" else None


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False
