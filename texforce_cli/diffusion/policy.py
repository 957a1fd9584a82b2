"""The policy: a Stable Diffusion pipeline as p_theta(x_{t-1} | x_t, tau_phi(s)), Eq. (1), with what of it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from texforce_cli.core.ddim import Schedule, at_least_fp32
from texforce_cli.errors import Unsuited, UsageError
from texforce_cli.presets import Family

if TYPE_CHECKING:
    from texforce_cli.diffusion.adapters import Adapter

Unconditional = Literal["trained", "snapshot", "base"]


@dataclass(frozen=True)
class Denoising:
    """How a picture is drawn: the same at sampling, training and evaluation."""

    steps: int
    guidance: float = 1.0
    eta: float = 1.0
    size: int | None = None
    negative_prompt: str = ""


@dataclass(frozen=True)
class Embeddings:
    """Text embeddings of a batch: `table` [P, L, D] of its distinct prompts, `rows` [N] the row of each image.

    `unconditional` [1, L, D] is the negative prompt's, None without guidance.
    """

    table: Tensor
    rows: Tensor
    unconditional: Tensor | None

    def conditional(self) -> Tensor:
        """One embedding an image, [N, L, D]."""
        return self.table.index_select(0, self.rows)  # not table[rows]: threads sum its gradient in an order of chance

    def repeat(self, times: int) -> Embeddings:
        """Those of the same images so many times over, which share their gradients."""
        return replace(self, rows=self.rows.repeat(times))

    def leaf(self) -> Embeddings:
        """The same values cut off from the encoder, gathering gradients where the encoder would."""
        cut = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in (self.table, self.unconditional)]
        assert cut[0] is not None
        return Embeddings(cut[0], self.rows, cut[1])

    def backward(self, leaf: Embeddings) -> None:
        """One backward through the encoder with everything that `leaf` has gathered.

        Exact: the loss depends on the encoder through these embeddings only, so the chain rule sums over timesteps
        before the encoder's Jacobian instead of after it.
        """
        pairs = ((self.table, leaf.table), (self.unconditional, leaf.unconditional))
        roots = [(ours, theirs.grad) for ours, theirs in pairs if ours is not None and theirs is not None]
        roots = [(tensor, grad) for tensor, grad in roots if grad is not None]
        if roots:
            torch.autograd.backward([tensor for tensor, _ in roots], [grad for _, grad in roots])


class Policy:
    """A frozen pipeline, its adapter and the way it draws.

    `adapter` is None for plain sampling. The schedule is made from the pipeline's own scheduler.
    """

    def __init__(
        self,
        pipeline: Any,
        denoising: Denoising,
        *,
        adapter: Adapter | None = None,
        unconditional: Unconditional = "trained",
    ) -> None:
        self.pipeline = pipeline
        self.denoising = denoising
        self.adapter = adapter
        self.unconditional = unconditional
        self.unet: Any = pipeline.unet
        self.compiled = False
        self.passed: Callable[[], None] = lambda: None
        """Called after each pass through the U-Net, the longest that nothing else is heard of one who works."""
        self.device: torch.device = pipeline.unet.device
        self.dtype: torch.dtype = pipeline.unet.dtype
        self.schedule = _schedule(pipeline.scheduler, denoising)
        self._still = _schedule(pipeline.scheduler, replace(denoising, eta=0.0))
        self.latent_shape = _latent_shape(pipeline, denoising.size)
        self._kept_unconditional: Tensor | None = None

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional branch; guidance 1 has none."""
        return self.denoising.guidance != 1.0

    @property
    def reuses_unconditional(self) -> bool:
        """Whether the unconditional branch of training equals that of sampling, so that it can be kept."""
        trains_unet = self.adapter is not None and self.adapter.trains("unet")
        return self.guided and self.unconditional != "trained" and not trains_unet

    def compile(self) -> None:
        """torch.compile the U-Net's transformer blocks, which are alike, so that it takes seconds.

        Not the U-Net as a whole: on a CPU, torch 2.13 then gives gradients of the text embeddings that are wrong by 70 %.
        """
        self.unet.compile_repeated_blocks()
        self.compiled = True

    def noise_at(self, steps: Sequence[int] | None) -> AbstractContextManager[None]:
        """Within this block only `steps` draw noise, and the others are deterministic; None: as the schedule says."""
        return self._by(self.schedule if steps is None else self.schedule.with_noise_at(steps, self._still))

    def in_steps(self, steps: int) -> AbstractContextManager[None]:
        """Within this block pictures are drawn in so many steps."""
        if steps == self.denoising.steps:
            return nullcontext()
        return self._by(_schedule(self.pipeline.scheduler, replace(self.denoising, steps=steps), "--eval-steps"))

    @contextmanager
    def _by(self, schedule: Schedule) -> Iterator[None]:
        usual, self.schedule = self.schedule, schedule
        try:
            yield
        finally:
            self.schedule = usual

    def embed(self, prompts: Sequence[str]) -> Embeddings:
        """Encode each distinct prompt once. Gradients flow to the text encoder's LoRA where they are enabled."""
        if not self.guided or self.unconditional == "trained":
            return self.embed_now(prompts)
        distinct, rows = self._distinct(prompts)
        return Embeddings(self._encode(distinct), rows, self._frozen_unconditional())

    def embed_now(self, prompts: Sequence[str]) -> Embeddings:
        """As `embed`, the negative prompt too by the weights as they are, never from a snapshot."""
        distinct, rows = self._distinct(prompts)
        if not self.guided:
            return Embeddings(self._encode(distinct), rows, None)
        table = self._encode([*distinct, self.denoising.negative_prompt])
        return Embeddings(table[:-1], rows, table[-1:])

    def embed_each(self, prompts: Sequence[str]) -> Embeddings:
        """The plain way: a row for every image, equal prompts encoded again; the negative prompt too."""
        n, negative = len(prompts), [self.denoising.negative_prompt] * len(prompts)
        rows = torch.arange(n, device=self.device)
        if self.guided and self.unconditional == "trained":
            both = self._encode([*prompts, *negative])
            return Embeddings(both[:n], rows, both[n:])
        return Embeddings(self._encode(prompts), rows, self._frozen_unconditional() if self.guided else None)

    def output(
        self, sample: Tensor, index: int | Tensor, embeddings: Embeddings, unconditional_output: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The network's guided output for x_t [N, C, H, W] at step `index`, and its unconditional branch, both fp32.

        Classifier-free guidance (Ho and Salimans 2022): u + w (c - u). A given `unconditional_output` is not computed
        again.
        """
        timestep = self.schedule.timestep_at(index, sample.device).expand(len(sample))
        sample = sample.to(self.dtype)
        conditional = embeddings.conditional().to(self.dtype)
        if not self.guided:
            return self._unet(sample, timestep, conditional), None
        if unconditional_output is None:
            assert embeddings.unconditional is not None
            nothing = embeddings.unconditional.to(self.dtype).expand(len(sample), -1, -1)
            if self.reuses_unconditional:
                # one branch a pass, as training will do it: another batch shape would change the last bits of the ratio
                with torch.no_grad():
                    unconditional_output = self._unet(sample, timestep, nothing)
                conditional_output = self._unet(sample, timestep, conditional)
            else:
                both = self._unet(
                    torch.cat([sample, sample]), torch.cat([timestep, timestep]), torch.cat([nothing, conditional])
                )
                unconditional_output, conditional_output = both.chunk(2)
        else:
            conditional_output = self._unet(sample, timestep, conditional)
        guided = unconditional_output + self.denoising.guidance * (conditional_output - unconditional_output)
        return guided, unconditional_output

    def snapshot_unconditional(self) -> None:
        """Freeze the negative prompt's embedding as it is now (`snapshot`) or as the base has it (`base`)."""
        if not self.guided or self.unconditional == "trained":
            return
        if self.unconditional == "snapshot" or self._kept_unconditional is None:
            with torch.no_grad():
                if self.unconditional == "base" and self.adapter is not None:
                    with self.adapter.disabled():
                        self._kept_unconditional = self._encode([self.denoising.negative_prompt])
                else:
                    self._kept_unconditional = self._encode([self.denoising.negative_prompt])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """x_0 -> pictures: uint8 [N, height, width, 3] on the CPU.

        Raises:
            Unsuited: values that are not finite: as uint8 they would be black.
        """
        _refuse_overflow("U-Net", latents)
        vae: Any = self.pipeline.vae
        pictures = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0].float()
        _refuse_overflow("VAE", pictures)
        return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()

    def too_long(self, prompt: str) -> int:
        """How many tokens of a prompt the text encoder does not see."""
        tokenizer: Any = self.pipeline.tokenizer
        return max(0, len(tokenizer(prompt, verbose=False).input_ids) - int(tokenizer.model_max_length))

    def _distinct(self, prompts: Sequence[str]) -> tuple[list[str], Tensor]:
        distinct = list(dict.fromkeys(prompts))
        row = {prompt: index for index, prompt in enumerate(distinct)}
        return distinct, torch.tensor([row[prompt] for prompt in prompts], device=self.device)

    def _frozen_unconditional(self) -> Tensor:
        if self._kept_unconditional is None:
            self.snapshot_unconditional()
        assert self._kept_unconditional is not None
        return self._kept_unconditional

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        embeddings: Tensor = encoder(tokens.input_ids, attention_mask=mask)[0]
        return at_least_fp32(embeddings)  # the gradients of all timesteps add up here

    def _unet(self, sample: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        result: Tensor = self.unet(sample, timestep, encoder_hidden_states=embeddings, return_dict=False)[0]
        self.passed()
        return at_least_fp32(result)


def _schedule(scheduler: Any, denoising: Denoising, option: str = "--steps") -> Schedule:
    timesteps = int(scheduler.config.num_train_timesteps)
    most = min(denoising.steps, timesteps)
    scheduler.set_timesteps(most)
    most -= max(0, int(scheduler.timesteps.max()) - (timesteps - 1))  # those of SD 1.x end at 1 and not at 0
    if denoising.steps > most:
        raise UsageError(
            f"{denoising.steps} denoising steps are too many", f"this model has {most}: use {option} {most} or fewer"
        )
    return Schedule.ddim(
        [int(t) for t in scheduler.timesteps],
        scheduler.alphas_cumprod.double().tolist(),
        float(scheduler.final_alpha_cumprod),
        eta=denoising.eta,
        prediction=scheduler.config.prediction_type,
    )


def _refuse_overflow(part: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise Unsuited(f"the {part} drew values that are not finite", "use --precision fp32 or bf16")


PIXELS: Mapping[Family, int] = {"tiny": 4, "sd": 8}
"""That a latent stands for, along one side."""


def latent_side(size: int, factor: int) -> int:
    """How many latents a side of `size` pixels has.

    Raises:
        UsageError: no whole number.
    """
    if size % factor or size <= 0:
        raise UsageError(
            f"the size {size} is not a positive multiple of {factor}", f"use {max(1, size // factor) * factor}"
        )
    return size // factor


def _latent_shape(pipeline: Any, size: int | None) -> tuple[int, int, int]:
    factor = int(pipeline.vae_scale_factor)
    if size is None:
        native = pipeline.unet.config.sample_size
        side = int(native if isinstance(native, int) else native[0])
    else:
        side = latent_side(size, factor)
    return int(pipeline.unet.config.in_channels), side, side
