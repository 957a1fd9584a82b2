"""The contract of a reward as one call, for the tests of whoever writes a plugin.

from texforce_cli.testing import check_reward

def test_contract():
    check_reward("my_plugin", "my-reward", options={"threshold": "0.5"})
"""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from texforce_cli.rewards import worker
from texforce_cli.rewards.registry import REWARDS, Registry, RewardInfo, plugin_calls, plugin_manager

HEAVY = ("torch", "tensorflow", "jax", "transformers", "diffusers", "mediapipe", "cv2", "pyiqa", "timm")
REGISTERS_WITHIN_SECONDS = 0.05

_REGISTER = """
import sys, time, json, importlib, pluggy
begun = time.perf_counter()
importlib.import_module(sys.argv[1])
seconds = time.perf_counter() - begun
print(json.dumps([seconds, [name for name in sys.argv[2:] if name in sys.modules]]))
"""


def pictures(count: int = 5, size: int = 96, seed: int = 0) -> NDArray[np.uint8]:
    """Pictures that differ: uint8 [count, size, size, 3], each a few random rectangles."""
    rng = np.random.default_rng(seed)
    images = np.full((count, size, size, 3), 128, np.uint8)
    for image in images:
        for _ in range(6):
            x, y = np.sort(rng.integers(0, size + 1, (2, 2)), axis=1)
            image[y[0] : y[1], x[0] : x[1]] = rng.integers(0, 256, 3)
    return images


def check_registration(module: str, name: str) -> RewardInfo:
    """Assert that `module` registers `name` as the contract says, quickly, and without importing anything heavy."""
    tries = (_seconds_to_import(module) for _ in range(5))  # a machine may be busy for once, and write bytecode first
    fast = any(seconds < REGISTERS_WITHIN_SECONDS for seconds in tries)
    assert fast, f"importing {module} takes more than {REGISTERS_WITHIN_SECONDS} s, five times over: import less there"
    begun = time.perf_counter()
    calls = plugin_calls(plugin_manager(), importlib.import_module(module), module, REWARDS)
    assert time.perf_counter() - begun < REGISTERS_WITHIN_SECONDS, "registering takes too long: import nothing there"
    assert calls, f"{module} registers nothing: is its texforce_register_rewards there, marked with @hookimpl?"
    registry = Registry()
    registry.add(calls, module, "0")
    infos = [info for (known, _), info in registry.rewards.items() if known == name]
    assert infos, f"{module} registers {', '.join(registry.names)}, not '{name}'"
    assert infos[0].summary, f"'{name}' has no summary for the list of rewards"
    return infos[0]


def _seconds_to_import(module: str) -> float:
    """In a fresh interpreter; asserts that nothing heavy comes along."""
    found = subprocess.run(
        [sys.executable, "-c", _REGISTER, module, *HEAVY], capture_output=True, text=True, check=False, timeout=120
    )
    assert found.returncode == 0, f"importing {module} fails: {found.stderr.strip().splitlines()[-1:]}"
    seconds, heavy = json.loads(found.stdout.splitlines()[-1])
    assert not heavy, f"importing {module} imports {', '.join(heavy)}: name the class as a string and import inside it"
    return float(seconds)


def check_reward(
    module: str,
    name: str,
    *,
    options: Mapping[str, str] | None = None,
    images: NDArray[np.uint8] | None = None,
    prompts: Sequence[str] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Assert the whole contract of the reward `name` that `module` registers.

    Registration; options that are typed; one finite float an image, in order, the same alone and in a batch, the same
    twice, within its range; inputs left as they were; the gradient, where one is promised; an end.

    Args:
        options: as on the command line, texts by name.
        images: uint8 [N, height, width, 3] with N > 1; by default five rectangles pictures.
        prompts: one an image; by default "a cat" and the like.
        tolerance: how far a score may be from itself in another batch, relative to the size of the scores.
    """
    info = check_registration(module, name)
    factory = worker.load(info.factory)
    for option in worker.list_options(factory):
        assert option["type"] in ("bool", "int", "float", "str"), (
            f"option '{option['name']}' is of the type {option['type']}: bool, int, float and str can be given as text"
        )
    reward = factory(**worker.typed_options(factory, options or {}))
    batch = pictures() if images is None else images
    texts = list(prompts) if prompts is not None else [f"a {noun}" for noun in ("cat", "dog", "fox", "cow", "bee")]
    texts = [texts[i % len(texts)] for i in range(len(batch))]
    scores = _score(reward, batch, texts)
    assert all(math.isfinite(value) for value in scores), f"scores that are not finite: {scores}"
    scale = tolerance * max(1.0, *map(abs, scores))
    assert np.allclose(_score(reward, batch, texts), scores, rtol=0, atol=scale), "the same batch twice, other scores"
    alone = [_score(reward, batch[i : i + 1], texts[i : i + 1])[0] for i in range(len(batch))]
    assert np.allclose(alone, scores, rtol=0, atol=scale), f"alone {alone}, in a batch {scores}"
    backwards = _score(reward, batch[::-1].copy(), texts[::-1])
    assert np.allclose(backwards[::-1], scores, rtol=0, atol=scale), "the scores do not follow the order of the images"
    if info.range:
        low, high = info.range
        assert all(low - scale <= value <= high + scale for value in scores), f"{scores} leave the range {info.range}"
    for what, number in (getattr(reward, "counts", None) or {}).items():
        assert isinstance(what, str) and int(number) == number, f"counts must be whole numbers by name, not {what!r}"
    if info.differentiable:
        _check_gradient(reward, batch, texts)
    close = getattr(reward, "close", None)
    if close is not None:
        close()


def _score(reward: Any, images: NDArray[np.uint8], prompts: Sequence[str]) -> list[float]:
    payload = np.ascontiguousarray(images).tobytes()
    given = worker.decode(payload, images.shape, getattr(reward, "input", "pil"))
    scores = worker.score(reward, given, prompts, [{} for _ in prompts])
    after = b"".join(np.asarray(image).tobytes() for image in given)
    assert after == payload, "the reward writes into the images that it is given"
    return scores


def _check_gradient(reward: Any, images: NDArray[np.uint8], prompts: Sequence[str]) -> None:
    import torch

    x = (torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255).requires_grad_()
    values = reward.score_tensor(x, list(prompts))
    assert values.shape == (len(prompts),), f"score_tensor returns the shape {tuple(values.shape)}"
    values.sum().backward()
    assert x.grad is not None, "score_tensor has no gradient"
    assert bool(torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0), "the gradient is zero or not finite"
