"""From rewards to advantages, the A of Eq. (5): how much better an image is than was to be expected.

Three baselines: the images of the same prompt in this epoch (group), those of the same prompt over epochs (prompt, the
paper and DDPO), or all images of the epoch (batch).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Advantages = Literal["group", "prompt", "batch"]
Floats = NDArray[np.float64]

EPSILON = 1e-6
"""Added to standard deviations: rewards that do not vary give advantages of zero, not of infinity."""


def varies(rewards: Floats) -> bool:
    """Whether the rewards of an epoch hold any signal at all."""
    return bool(np.ptp(rewards) > EPSILON)


def batch_advantages(rewards: Floats) -> Floats:
    """(R - mean) / (std + eps) over all images: [N] -> [N]."""
    return np.asarray((rewards - rewards.mean()) / (rewards.std() + EPSILON))


def group_advantages(rewards: Floats, prompts: Sequence[str]) -> Floats:
    """R minus the mean of its prompt's images, over the pooled std of these differences: [N] -> [N].

    A global scale: a prompt whose images hardly differ has small advantages instead of amplified noise. A prompt with
    one image has an advantage of zero.
    """
    centred = rewards.astype(np.float64).copy()
    groups = np.unique(np.asarray(prompts), return_inverse=True)[1]
    for group in range(groups.max() + 1):
        centred[groups == group] -= rewards[groups == group].mean()
    return np.asarray(centred / (np.sqrt(np.mean(centred**2)) + EPSILON))


class PromptTracker:
    """Running rewards of each prompt: the last `buffer` of them give its mean and std.

    A prompt with fewer than `minimum` rewards falls back on the statistics of the epoch.
    """

    def __init__(self, buffer: int = 32, minimum: int = 16) -> None:
        self.buffer, self.minimum = buffer, minimum
        self._rewards: dict[str, deque[float]] = {}

    def advantages(self, rewards: Floats, prompts: Sequence[str]) -> Floats:
        """(R - mean) / (std + eps) of each prompt's recent rewards, these included: [N] -> [N]."""
        result = np.empty(len(rewards))
        labels = np.asarray(prompts)
        for prompt in dict.fromkeys(prompts):
            mine = labels == prompt
            recent = self._rewards.setdefault(prompt, deque(maxlen=self.buffer))
            recent.extend(rewards[mine].tolist())
            known = np.asarray(recent) if len(recent) >= self.minimum else rewards
            result[mine] = (rewards[mine] - known.mean()) / (known.std() + EPSILON)
        return result

    def inert(self, prompts: Iterable[str]) -> list[str]:
        """Those of `prompts` that have too few rewards for statistics of their own."""
        return [p for p in dict.fromkeys(prompts) if len(self._rewards.get(p, ())) < self.minimum]

    def state_dict(self) -> dict[str, list[float]]:
        """The rewards kept for each prompt."""
        return {prompt: list(rewards) for prompt, rewards in self._rewards.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Continue from a `state_dict`."""
        self._rewards = {prompt: deque(rewards, maxlen=self.buffer) for prompt, rewards in state.items()}
