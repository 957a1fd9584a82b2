"""The U-Net passes of an epoch and nothing else: what no trainer of the same network can be faster than."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.flops import teraflop
from texforce_cli.diffusion.policy import Policy


class Floor:
    """`steps` forwards an image and branch, then `trained` forwards with a backward to the text embeddings, or to the U-Net's LoRA
    where the policy trains one.

    `branches` of sampling and of training: 2 with guidance, 1 without; a kept unconditional branch leaves training 1.
    """

    def __init__(
        self, policy: Policy, *, images: int, micro_batch: int, steps: int, trained: int, branches: tuple[int, int]
    ) -> None:
        self.policy, self.micro_batch = policy, micro_batch
        batches = images // micro_batch
        self.passes = {"sampling": batches * steps, "training": batches * trained}
        self._sizes = {"sampling": micro_batch * branches[0], "training": micro_batch * branches[1]}
        with torch.no_grad():
            self._embedding = policy.embed(["a cat"]).table.to(policy.dtype)

    def run(self) -> dict[str, float]:
        """Seconds of an epoch's passes, by phase and in `total`."""
        seconds = {phase: self._timed(self._pass(phase), passes) for phase, passes in self.passes.items()}
        return {**seconds, "total": sum(seconds.values())}

    def gigaflop(self) -> dict[str, float]:
        """Of an epoch's passes, by phase; PyTorch's own count."""
        return {phase: 1000 * teraflop(self._pass(phase)) * passes for phase, passes in self.passes.items()}

    def _pass(self, phase: str) -> Callable[[], None]:
        size = self._sizes[phase]
        shape = (size, *self.policy.latent_shape)
        sample = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
            self.policy.device, self.policy.dtype
        )
        timestep = torch.full((size,), 500, device=self.policy.device)
        embeddings = self._embedding.expand(size, -1, -1).contiguous()

        def unet(text: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.policy.unet(sample, timestep, encoder_hidden_states=text, return_dict=False)[0]
            return result

        def forward() -> None:
            with torch.no_grad():
                unet(embeddings)

        def forward_and_backward() -> None:
            text = embeddings.detach()
            learnt = [p for p in self.policy.unet.parameters() if p.requires_grad] or [text.requires_grad_()]
            output = unet(text)
            torch.autograd.backward([output], [torch.ones_like(output)])
            for parameter in learnt:
                parameter.grad = None

        return forward if phase == "sampling" else forward_and_backward

    def _timed(self, one: Callable[[], None], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            one()
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
