"""What a run on Stable Diffusion costs: its work and its memory, computed from the layers."""

from __future__ import annotations

from dataclasses import dataclass

from texforce_cli.config import TrainConfig
from texforce_cli.core.train_steps import TrainSteps
from texforce_cli.team import sharing

_FORWARD, _BACKWARD, _DECODING = 0.803, 0.866, 2.51
"""TFLOP for an image of 512 pixels: a call of SD 1.5's U-Net (one branch), its backward to the text embeddings, and the VAE's decoder.
PyTorch's own count (benchmarks/flops.py)."""
_ACTIVATIONS = {"text-encoder": (0.80, 1.57), "unet": (1.08, 1.66), "both": (1.11, 1.70)}
_CHECKPOINTED = (0.29, 0.51)
"""GB that a pass of training holds for a branch and an image of 512 pixels, in half precision and in fp32: what is alive at once on
SD 1.5's layers with fused attention, PyTorch's own count (benchmarks/memory.py). A LoRA keeps fp32 copies of its inputs."""


def computed_petaflop(images: float, sampling_calls: float, training_calls: float, size: int) -> float:
    """Work of a run on SD 1.x, computed: a training call is a forward and a backward."""
    work = _DECODING * images + _FORWARD * sampling_calls + (_FORWARD + _BACKWARD) * training_calls
    return work * (size / 512) ** 2 / 1000


def computed_hours(petaflop: float, teraflops: float) -> float:
    """Hours of work at a sustained rate, rewards left out."""
    return petaflop * 1000 / teraflops / 3600


@dataclass(frozen=True)
class Memory:
    """What a run on SD 1.x holds, computed: 1.07 G parameters, and `latents` an image in fp32, which are there twice while an
    epoch's are joined, and then once beside the activations of a pass of training through `branches` in `steps` of each image
    together."""

    train: str
    precision: str
    checkpointing: bool
    branches: int
    steps: int
    images: int
    latents: int
    size: int

    def gb(self, micro_batch: int) -> float:
        """With so many images in a pass."""
        trajectories = self.images * self.latents * 16384 * (self.size / 512) ** 2 * 4 / 1e9
        weights = 1.07 * (4 if self.precision == "fp32" else 2)
        return weights + trajectories + max(trajectories, self.activations(micro_batch))

    def activations(self, micro_batch: int) -> float:
        """GB that a pass of training holds at most."""
        half, full = _CHECKPOINTED if self.checkpointing else _ACTIVATIONS[self.train]
        one = full if self.precision == "fp32" else half
        return one * (self.size / 512) ** 2 * self.branches * self.steps * micro_batch

    def micro_batch(self, gb: float) -> int:
        """The largest of 8, 4, 2, 1 that fits into 90 % of `gb`."""
        return max((n for n in (8, 4, 2) if self.gb(n) < 0.9 * gb), default=1)


def ways_to_save(config: TrainConfig, micro_batch: int) -> str:
    """What a run can be given to hold less, where so many images in a pass are too many."""
    ways = [] if config.gradient_checkpointing else ["--gradient-checkpointing"]
    ways += ["--precision bf16"] if config.precision == "fp32" else []
    ways += ["a smaller --micro-batch"] if micro_batch > 1 else []
    return " or ".join([*ways, "a smaller --size", "fewer --samples-per-epoch"])


def memory_of(config: TrainConfig, size: int) -> Memory:
    """What each process of a run on Stable Diffusion holds, with pictures of `size` pixels."""
    return Memory(
        config.train,
        config.precision,
        config.gradient_checkpointing,
        config.branches[1],
        min(config.timestep_batch or 1, TrainSteps.parse(config.train_steps).count(config.steps)),
        -(-config.samples_per_epoch // sharing(config.num_processes)[0]),
        config.kept_latents,
        size,
    )
