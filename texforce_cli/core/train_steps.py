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
    """`first` N steps; a `random` share F of them, others for each image (the paper: 0.5); `all`; or a `window` of K, which are
    then the only ones of the epoch that draw noise (an approximation, after MixGRPO, Li et al. 2025, arXiv 2507.21802).
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
        starts = range(self._latest_start(steps) + 1)
        return [sum(start <= i < start + count for start in starts) / len(starts) for i in range(steps)]

    def choose(self, stochastic: Sequence[int], images: int, rng: np.random.Generator) -> NDArray[Any]:
        """Step indices [K, images] of one pass over the data, among the `stochastic` steps of the epoch's schedule."""
        import numpy as np

        steps, count = np.asarray(stochastic), self.count(len(stochastic))
        if self.kind == "random":
            return np.stack([rng.permutation(steps)[:count] for _ in range(images)], axis=1)
        return np.repeat(steps[:count, None], images, axis=1)

    def window(self, stochastic: Sequence[int], rng: np.random.Generator) -> Sequence[int] | None:
        """The steps of one epoch that draw noise: K consecutive ones that begin in the first half of the schedule, the same for
        all images. None: all of them do.
        """
        if self.kind != "window":
            return None
        start = int(rng.integers(self._latest_start(len(stochastic)) + 1))
        return stochastic[start : start + self.count(len(stochastic))]

    def _latest_start(self, steps: int) -> int:
        return max(0, min(steps // 2, steps - self.count(steps))) if self.kind == "window" else 0


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False
