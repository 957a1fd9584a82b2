"""The textbook form of DDPO on a text encoder: what the default must equal, and what benchmarks compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from texforce_cli.algorithms.ddpo import DDPO
from texforce_cli.diffusion.sampler import Trajectory
from texforce_cli.prompts import Prompt
from texforce_cli.rewards.terms import finished


class PlainDDPO(DDPO):
    """Both prompts are encoded and back-propagated again at every timestep, and images are scored one by one."""

    def _accumulate(
        self, drawn: Trajectory, images: Tensor, steps: Tensor, advantages: Tensor, scale: float
    ) -> Iterator[tuple[Tensor, float]]:
        prompts = [drawn.prompts[i] for i in images.tolist()]
        for step in steps:
            embeddings = self.policy.embed_each(prompts)
            loss, log_ratio, penalty = self._loss(drawn, images, step, advantages, embeddings, self._reference(prompts))
            self.optimisation.backward(loss * scale)
            yield log_ratio, penalty

    def _score(self, drawn: Trajectory, batch: Sequence[Prompt]) -> Future[dict[str, NDArray[np.float64]]]:
        single = [
            self.rewards.score(drawn.images[i : i + 1], drawn.prompts[i : i + 1], [prompt.metadata])
            for i, prompt in enumerate(batch)
        ]
        return finished({name: np.concatenate([scores[name] for scores in single]) for name in single[0]})
