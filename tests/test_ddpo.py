"""DDPO on the embedded model: exact gradients, exact ratios, and learning."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from texforce_cli.algorithms.ddpo import DDPO, DDPOSettings
from texforce_cli.algorithms.optimisation import MOST_LOST, Optimisation, OptimiserSettings, learning_rate_factor
from texforce_cli.algorithms.reference import PlainDDPO
from texforce_cli.config import TrainConfig
from texforce_cli.core.statistics import paired_interval
from texforce_cli.core.train_steps import TrainSteps
from texforce_cli.devices import cpu_computes_bf16
from texforce_cli.diffusion.adapters import Adapter
from texforce_cli.diffusion.models import Precision, load_pipeline, resolve_model
from texforce_cli.diffusion.policy import Denoising, Policy
from texforce_cli.diffusion.sampler import Trajectory, draw, rollout
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.prompts import Prompt
from texforce_cli.rewards.registry import load_registry
from texforce_cli.rewards.terms import RewardSet, finished, parse_terms
from texforce_cli.team import Team
from texforce_cli.workflows.assembly import make_optimisation, make_policy

PROMPTS = [Prompt("a cat"), Prompt("a red dog"), Prompt("two foxes")]


def make(
    pipeline: Any,
    kind: type[DDPO] = DDPO,
    *,
    train: str = "text-encoder",
    guidance: float = 1.0,
    unconditional: str = "trained",
    steps: str = "first:3",
    seed: int = 0,
    rate: float = 1e-2,
    **settings: Any,
) -> DDPO:
    adapter = Adapter.insert(pipeline, train, rank=4, alpha=4, seed=seed)  # type: ignore[arg-type]
    policy = Policy(pipeline, Denoising(6, guidance), adapter=adapter, unconditional=unconditional)  # type: ignore[arg-type]
    optimisation = Optimisation(adapter.parameters(), OptimiserSettings(rate, 100))
    numbers = {"samples": 12, "group_size": 4, "micro_batch": 4, "update_batch": 12, "clip_range": 8e-4} | settings
    return kind(
        policy,
        RewardSet(parse_terms(["brightness"]), load_registry()),
        optimisation,
        PROMPTS,
        DDPOSettings(train_steps=TrainSteps.parse(steps), **numbers),
        seed=seed,
        progress=lambda *done, **reward: None,
    )


def gradients(algorithm: DDPO) -> list[torch.Tensor]:
    """The gradient of one whole update with B moved away from zero, before the optimiser uses it."""
    generator = torch.Generator().manual_seed(5)
    assert algorithm.policy.adapter is not None
    for parameter in algorithm.policy.adapter.parameters():
        parameter.data = parameter.data.double()
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    texts = [p.text for p in PROMPTS for _ in range(2)]
    drawn = rollout(algorithm.policy, texts, range(6), latent_dtype=torch.float64)
    for parameter in algorithm.policy.adapter.parameters():  # so that the ratio is not 1 and some are clipped
        parameter.data += 1e-3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    images = torch.tensor([3, 0, 5, 1, 2, 4])
    stochastic = algorithm.policy.schedule.stochastic
    chosen = torch.from_numpy(algorithm.settings.train_steps.choose(stochastic, 6, np.random.default_rng(0)))
    advantages = torch.linspace(-1, 1, 6, dtype=torch.float64)
    list(algorithm._accumulate(drawn, images, chosen, advantages, 1.0))
    return [parameter.grad.clone() for parameter in algorithm.policy.adapter.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    ("guidance", "train", "steps"),
    [(1.0, "text-encoder", "first:3"), (3.0, "text-encoder", "random:0.5"), (3.0, "both", "first:2")],
)
def test_one_encoder_backward_gives_the_gradient_of_the_plain_way(
    pipeline: Any, guidance: float, train: str, steps: str
) -> None:
    found = []
    for kind in (DDPO, PlainDDPO):
        from texforce_cli.diffusion.models import load_pipeline, resolve_model

        double = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32").to(torch.float64)
        found.append(gradients(make(double, kind, guidance=guidance, train=train, steps=steps, clip_range=1e-5)))
    ours, plain = (torch.cat([g.flatten() for g in grads]) for grads in found)
    assert len(found[0]) == len(found[1]) > 0
    assert plain.norm() > 0
    assert ((ours - plain).norm() / plain.norm()).item() <= 1e-9


def test_what_makes_an_epoch_exact_and_fast(pipeline: Any) -> None:
    """Each distinct prompt is encoded once a pass; autograd begins at the first cross-attention; attention and AdamW are fused."""
    algorithm = make(pipeline, guidance=3.0)
    encoded, graphs = [], []
    unet = algorithm.policy.pipeline.unet
    block = next(block for block in unet.down_blocks if hasattr(block, "attentions"))
    first = block.attentions[0].transformer_blocks[0]
    hooks = [
        algorithm.policy.pipeline.text_encoder.register_forward_hook(
            lambda module, args, output: encoded.append(len(output[0]))
        ),
        unet.conv_in.register_forward_hook(lambda module, args, output: graphs.append((0, output.requires_grad))),
        first.attn1.register_forward_hook(lambda module, args, output: graphs.append((0, output.requires_grad))),
        first.attn2.register_forward_hook(lambda module, args, output: graphs.append((1, output.requires_grad))),
    ]
    algorithm.run_epoch(0)
    for hook in hooks:
        hook.remove()
    drawn, learnt = encoded[:3], encoded[3:]  # three passes of four images each
    assert max(encoded) <= len(PROMPTS) + 1 and drawn == [2, 2, 2]  # a group of four is one prompt, and the empty one
    assert len(learnt) == 3
    assert (0, False) in graphs and (1, True) in graphs and (0, True) not in graphs
    kinds = {type(processor).__name__ for processor in unet.attn_processors.values()}
    assert kinds == {"AttnProcessor2_0"}
    assert algorithm.optimisation._adam.defaults["fused"]


@pytest.mark.parametrize(
    ("unconditional", "steps", "kl"),
    [("trained", "first:3", 0.1), ("snapshot", "random:0.5", 0.0), ("base", "all", 0.1)],
)
def test_steps_taken_together_give_the_gradient_of_one_by_one(unconditional: str, steps: str, kl: float) -> None:
    found = []
    for timestep_batch in (1, 2):  # of 3 or 6 steps, so that one pass may be left with less
        double = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32").to(torch.float64)
        algorithm = make(
            double, guidance=3.0, unconditional=unconditional, steps=steps, kl_weight=kl, timestep_batch=timestep_batch
        )
        found.append(torch.cat([g.flatten() for g in gradients(algorithm)]))
    assert found[0].norm() > 0
    assert ((found[1] - found[0]).norm() / found[0].norm()).item() <= 1e-9


@pytest.mark.parametrize("timestep_batch", [1, 4])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("unconditional", ["trained", "snapshot", "base"])
def test_with_unchanged_weights_the_ratio_is_one(
    pipeline: Any, guidance: float, unconditional: str, timestep_batch: int
) -> None:
    result = make(
        pipeline, guidance=guidance, unconditional=unconditional, steps="all", timestep_batch=timestep_batch
    ).preflight()
    assert result.ratio_error < 2e-5
    assert len(result.steps) == 6
    assert result.ok


def test_a_wrong_guidance_at_training_is_caught_by_the_preflight(pipeline: Any) -> None:
    algorithm = make(pipeline, guidance=3.0)
    draw = algorithm._draw

    def draw_with_more(epoch: int, indices: range, prompts: Any) -> Any:
        algorithm.policy.denoising = Denoising(6, 3.5)
        drawn = draw(epoch, indices, prompts)
        algorithm.policy.denoising = Denoising(6, 3.0)
        return drawn

    algorithm._draw = draw_with_more  # type: ignore[method-assign]
    assert not algorithm.preflight().ok


def test_a_network_that_overflows_is_refused_by_name(pipeline: Any) -> None:
    algorithm = make(pipeline, steps="all")
    real = algorithm.policy.unet
    algorithm.policy.unet = lambda sample, *a, **k: tuple(o * float("nan") for o in real(sample, *a, **k))
    with pytest.raises(TexforceError, match="not finite"):
        algorithm.preflight()


def test_an_autoencoder_that_overflows_is_refused_by_name(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda *a, **k: tuple(o * float("inf") for o in real(*a, **k)))
    with pytest.raises(TexforceError, match="VAE drew values that are not finite"):
        draw(Policy(pipeline, Denoising(2)), ["a cat"], [0], batch=1)


def test_a_ratio_of_nan_at_any_step_fails_the_preflight(pipeline: Any) -> None:
    algorithm = make(pipeline, steps="all")
    drawn = algorithm._draw(-1, range(4), ["a cat"] * 4)
    drawn.log_probs[3, 2] = float("nan")
    algorithm._draw = lambda *arguments: drawn  # type: ignore[method-assign]
    result = algorithm.preflight()
    assert not result.ok and result.ratio_error == float("inf")


def test_a_preflight_can_be_stopped_between_its_passes(pipeline: Any) -> None:
    """Minutes on Stable Diffusion: 8 images in 6 steps, drawn by four and computed again by four, a step a pass."""
    algorithm, told = make(pipeline, steps="all"), []

    def stop(phase: str, done: int, total: int, *, reward: float | None = None) -> None:
        told.append((phase, done, total))
        if done == limit:
            raise KeyboardInterrupt

    algorithm.progress = stop
    limit = 52
    with pytest.raises(KeyboardInterrupt):
        algorithm.preflight()
    assert told == [("preflight", done, 96) for done in (24, 48, 52)]
    limit = 0
    algorithm.preflight()
    assert told[-1] == ("preflight", 96, 96)


def half_the_gradient(graph: Any, inputs: Any) -> Any:
    """A compiler with a fault: the values are right, the gradient is half."""
    return lambda *arguments: [(value + value.detach()) / 2 for value in graph(*arguments)]


@pytest.mark.parametrize(
    ("backend", "ok"),
    [("eager", True), (half_the_gradient, False), pytest.param("inductor", True, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("train", ["text-encoder", pytest.param("unet", marks=pytest.mark.slow)])
def test_a_compiler_that_changes_the_gradient_is_caught_by_the_preflight(
    pipeline: Any, train: str, backend: Any, ok: bool
) -> None:
    torch.compiler.reset()
    algorithm = make(pipeline, train=train)
    assert algorithm.preflight().gradient_error is None
    compile_blocks = pipeline.unet.compile_repeated_blocks
    pipeline.unet.compile_repeated_blocks = lambda: compile_blocks(backend=backend)
    algorithm.policy.compile()
    result = algorithm.preflight()
    assert result.gradient_error is not None and result.ratio_ok
    assert result.ok is result.gradient_ok is ok
    assert result.gradient_error < 1e-4 if ok else result.gradient_error > 0.3


def policy_of(precision: Precision, **options: Any) -> DDPO:
    """An algorithm whose policy is made as a run makes it."""
    pipeline = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision=precision)
    algorithm = make(pipeline, guidance=3.0, clip_range=0.5)
    assert algorithm.policy.adapter is not None
    config = TrainConfig(steps=6, guidance=3.0, precision=precision, **options)
    algorithm.policy = make_policy(pipeline, config, algorithm.policy.adapter)
    return algorithm


@pytest.mark.parametrize(
    ("precision", "checkpointing", "most"), [("fp32", True, 1e-5), ("bf16", False, 0.1), ("bf16", True, 0.1)]
)
def test_what_saves_memory_leaves_the_gradient_as_it_is(precision: Precision, checkpointing: bool, most: float) -> None:
    found = []
    for algorithm in (policy_of("fp32"), policy_of(precision, gradient_checkpointing=checkpointing)):
        passes: list[int] = []
        algorithm.policy.unet.mid_block.resnets[-1].register_forward_pre_hook(lambda *about: passes.append(1))  # noqa: B023
        drawn = algorithm._draw(0, range(4), [p.text for p in PROMPTS] + ["a cat"])
        passes.clear()
        found.append(algorithm._gradient(drawn, torch.arange(4)))
    assert len(passes) == (2 if checkpointing else 1)  # what is not kept is computed again
    assert found[0].norm() > 0
    assert ((found[1] - found[0]).norm() / found[0].norm()).item() <= most


@pytest.mark.skipif(not cpu_computes_bf16(), reason="the processor does not multiply in bf16")
def test_in_bf16_the_ratio_is_as_exact_as_the_embedded_models_preset_wants() -> None:
    algorithm = policy_of("bf16")
    assert algorithm.preflight().ratio_error < 0.1 * 8e-4


def test_plain_attention_in_bf16_draws_what_the_fused_one_draws() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    unet: Any = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="bf16").unet
    x, words = torch.randn(2, 8, 16, 16).bfloat16(), torch.randn(2, 32, 128).bfloat16()
    with torch.no_grad():
        plain = unet(x, 500, words).sample.float()
        unet.set_attn_processor(AttnProcessor2_0())
        fused = unet(x, 500, words).sample.float()
    assert ((plain - fused).norm() / fused.norm()).item() < 0.02


def test_every_step_that_may_be_trained_is_judged(pipeline: Any) -> None:
    steps = make(pipeline, steps="window:2").preflight().steps
    assert [step["trained"] for step in steps] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_window_draws_noise_and_learns_there_alone(pipeline: Any) -> None:
    algorithm = make(pipeline, steps="window:2")
    seen: list[Trajectory] = []
    steps: list[torch.Tensor] = []
    draw_one, update = algorithm._draw, algorithm._update

    def drawn(*arguments: Any) -> Trajectory:
        seen.append(draw_one(*arguments))
        return seen[-1]

    def updated(rollouts: Any, chosen: Any, at: torch.Tensor, advantages: Any) -> Any:
        steps.append(at)
        return update(rollouts, chosen, at, advantages)

    algorithm._draw, algorithm._update = drawn, updated  # type: ignore[method-assign]
    usual = algorithm.policy.schedule
    for epoch in range(2):
        report = algorithm.run_epoch(epoch)
        assert report.ratio_error < 1e-6 and report.grad_norm > 0
        noisy = [i for i, one in enumerate(seen[-1].log_probs) if one.isfinite().all()]
        assert steps[-1][:, 0].tolist() == noisy == [0, 1]
    assert algorithm.policy.schedule is usual and len(usual.stochastic) > 2


def test_half_precision_latents_are_scored_as_they_are_stored(pipeline: Any) -> None:
    policy = make(pipeline).policy
    drawn = rollout(policy, ["a cat"] * 2, [0, 1], latent_dtype=torch.bfloat16)
    assert drawn.latents.dtype == torch.bfloat16
    embeddings = policy.embed(drawn.prompts)
    with torch.no_grad():
        for index in policy.schedule.stochastic:
            output, _ = policy.output(drawn.latents[index], index, embeddings)
            mean = policy.schedule.mean(drawn.latents[index], output, index)
            again = policy.schedule.log_prob(drawn.latents[index + 1], mean, index)
            assert (again - drawn.log_probs[index]).abs().max() < 2e-5


def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(pipeline: Any) -> None:
    policy = Policy(pipeline, Denoising(4, 2.0))
    together = rollout(policy, ["a cat", "a dog", "two foxes"], [1, 2, 3])
    alone = rollout(policy, ["a dog"], [2])
    assert torch.equal(together.latents[0, 1], alone.latents[0, 0])  # the noise, to the bit
    difference = np.abs(together.images[1].astype(int) - alone.images[0].astype(int))
    assert difference.max() <= 2  # the arithmetic, but for rounding in kernels of another batch


def test_the_snapshot_keeps_the_unconditional_branch_of_sampling(pipeline: Any) -> None:
    algorithm = make(pipeline, guidance=3.0, unconditional="snapshot")
    calls: list[int] = []
    inner = algorithm.policy.unet
    algorithm.policy.unet = lambda sample, *a, **k: (calls.append(len(sample)), inner(sample, *a, **k))[1]
    algorithm.policy.snapshot_unconditional()
    drawn = algorithm._draw(0, range(4), ["a cat"] * 4)
    assert drawn.unconditional is not None and drawn.unconditional.shape[0] == 6
    calls.clear()
    images = torch.arange(4)
    list(algorithm._accumulate(drawn, images, torch.zeros(1, 4, dtype=torch.long), torch.ones(4), 1.0))
    assert calls == [4]  # one branch only


def test_the_snapshot_is_taken_again_each_epoch_and_the_base_never(pipeline: Any) -> None:
    for kind, changes in (("snapshot", True), ("base", False)):
        algorithm = make(pipeline, guidance=3.0, unconditional=kind, seed=len(kind))
        algorithm.policy.snapshot_unconditional()
        before = algorithm.policy._frozen_unconditional().clone()
        assert algorithm.policy.adapter is not None
        for parameter in algorithm.policy.adapter.parameters():
            parameter.data += 0.1
        algorithm.policy.snapshot_unconditional()
        assert torch.equal(before, algorithm.policy._frozen_unconditional()) is not changes


@pytest.mark.parametrize("train", ["text-encoder", "unet", "both"])
def test_only_the_chosen_component_is_trained(pipeline: Any, train: str) -> None:
    algorithm = make(pipeline, train=train)
    names = {name.partition(".")[0] for name in algorithm.policy.adapter.export()}  # type: ignore[union-attr]
    assert names == {"text-encoder": {"text_encoder"}, "unet": {"unet"}, "both": {"text_encoder", "unet"}}[train]
    before = {k: v.clone() for k, v in pipeline.unet.state_dict().items() if "lora" not in k}
    algorithm.run_epoch(0)
    assert all(torch.equal(before[k], v) for k, v in pipeline.unet.state_dict().items() if "lora" not in k)


@pytest.mark.parametrize(
    ("train", "rate", "samples", "epochs"), [("text-encoder", 2e-2, 128, 4), ("unet", 5e-3, 64, 3)]
)
def test_brightness_rises_on_pictures_that_training_never_saw(
    pipeline: Any, train: str, rate: float, samples: int, epochs: int
) -> None:
    algorithm = make(
        pipeline,
        train=train,
        rate=rate,
        samples=samples,
        micro_batch=16,
        group_size=samples // 4,
        update_batch=16,
        steps="first:4",
    )
    texts, seeds = ["a cat", "two foxes", "a cow", "a red car"] * 6, range(1000, 1024)

    def brightness() -> list[float]:
        images = draw(algorithm.policy, texts, seeds, batch=24)
        return algorithm.rewards.score(images, texts, [{}] * len(texts))["brightness"].tolist()

    before = brightness()
    for epoch in range(epochs):
        algorithm.run_epoch(epoch)
    assert paired_interval(brightness(), before).low > 0


def test_rewards_that_do_not_vary_change_nothing_and_say_so(pipeline: Any) -> None:
    algorithm = make(pipeline)
    algorithm._score = lambda drawn, batch: finished({"brightness": np.full(len(batch), 0.5)})  # type: ignore[method-assign]
    before = algorithm.policy.adapter.export()  # type: ignore[union-attr]
    report = algorithm.run_epoch(0)
    assert report.flat and "did not vary" in report.warnings[0]
    assert all(torch.equal(before[k], v) for k, v in algorithm.policy.adapter.export().items())  # type: ignore[union-attr]


def test_rewards_that_vary_between_prompts_only_teach_a_group_nothing(pipeline: Any) -> None:
    algorithm = make(pipeline)
    level = {prompt.text: float(i) for i, prompt in enumerate(PROMPTS)}
    algorithm._score = lambda drawn, batch: finished({"brightness": np.array([level[p.text] for p in batch])})  # type: ignore[method-assign]
    before = {k: v.clone() for k, v in algorithm.policy.adapter.export().items()}  # type: ignore[union-attr]
    report = algorithm.run_epoch(0)
    assert report.flat and "among the images of a prompt" in report.warnings[0]
    assert all(torch.equal(before[k], v) for k, v in algorithm.policy.adapter.export().items())  # type: ignore[union-attr]


def test_disabling_nests(pipeline: Any) -> None:
    adapter = make(pipeline).policy.adapter
    assert adapter is not None
    layer = next(layer for _, layer in adapter.layers())
    with adapter.disabled():
        with adapter.disabled():
            pass
        assert layer._disable_adapters
    assert not layer._disable_adapters


def test_an_overflow_of_fp16_halves_the_scale_and_leaves_the_update_out() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimisation = Optimisation([parameter], OptimiserSettings(0.1, 10, loss_scale=4.0))
    optimisation.backward(parameter.sum() * 0.5)
    assert parameter.grad is not None and parameter.grad.item() == 2.0
    parameter.grad.fill_(float("inf"))
    assert math.isnan(optimisation.step())
    assert parameter.item() == 1.0 and optimisation.loss_scale == 2.0 and optimisation.updates == 0
    optimisation.backward(parameter.sum() * 0.5)
    assert optimisation.step() == pytest.approx(0.5)


def test_overflows_of_fp16_without_an_end_end_the_run() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimisation = Optimisation([parameter], OptimiserSettings(0.1, 10, loss_scale=2.0**20))
    for _ in range(2 * MOST_LOST - 1):
        parameter.grad = torch.tensor([math.inf])
        assert math.isnan(optimisation.step())
    parameter.grad = torch.tensor([math.inf])
    with pytest.raises(TexforceError, match="too many gradients were not finite: 10 in a row"):
        optimisation.step()


def test_fp16_keeps_the_gradient_of_a_run_of_full_size() -> None:
    """The loss is divided by the images and steps of an update and by the elements of a latent: here by those of the paper's runs
    on Stable Diffusion, of which 2^12 alone would leave numbers that fp16 cannot hold."""
    policies = {precision: policy_of(precision) for precision in ("fp32", "fp16")}
    drawn = policies["fp32"]._draw(0, range(4), [p.text for p in PROMPTS] + ["a cat"])
    count = 256 * 25 * 16384 // math.prod(policies["fp32"].policy.latent_shape)
    found = {}
    for precision, algorithm in policies.items():
        config = TrainConfig(
            precision=precision, micro_batch=1, grad_accum=count, samples_per_epoch=count, train_steps="first:1"
        )
        algorithm.optimisation.loss_scale = make_optimisation(config, algorithm.policy).loss_scale
        for _ in algorithm._accumulate(
            drawn, torch.arange(4), torch.zeros(1, 4, dtype=torch.int64), torch.tensor([1.0, -1, 1, -1]), 1 / count
        ):
            pass
        gradients = [parameter.grad for parameter in algorithm.optimisation.parameters if parameter.grad is not None]
        found[precision] = torch.cat([one.flatten() for one in gradients]) / algorithm.optimisation.loss_scale
    assert policies["fp16"].optimisation.loss_scale == 2.0**21 and policies["fp32"].optimisation.loss_scale == 1
    assert ((found["fp16"] - found["fp32"]).norm() / found["fp32"].norm()).item() < 0.05


def test_too_few_images_a_prompt_for_the_tracker_are_named(pipeline: Any) -> None:
    report = make(pipeline, advantages="prompt", group_size=1).run_epoch(0)
    assert "3 of 3 prompts have fewer than 16 rewards" in report.warnings[0]


def test_the_kl_term_is_zero_at_the_base_and_holds_the_weights_back(pipeline: Any) -> None:
    report = make(pipeline, kl_weight=1.0, update_batch=12).run_epoch(0)
    assert report.reference_kl == pytest.approx(0.0, abs=1e-9)
    report = make(pipeline, kl_weight=1.0, update_batch=4, seed=1).run_epoch(0)
    assert report.reference_kl is not None and report.reference_kl > 0


def test_a_gradient_that_is_not_finite_is_passed_over_and_five_in_a_row_end_the_run() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimisation = Optimisation([parameter], OptimiserSettings(0.1, 10))

    def step(value: float) -> float:
        parameter.grad = torch.tensor([1.0, value, 0.0])
        return optimisation.step()

    for _ in range(MOST_LOST - 1):
        assert math.isnan(step(math.nan))
    assert parameter.tolist() == [1.0, 1.0, 1.0] and optimisation.updates == 0
    for _ in range(2 * MOST_LOST):
        assert math.isfinite(step(1.0))  # begins to count anew
    moved = parameter.tolist()
    for _ in range(MOST_LOST - 1):
        step(math.inf)
    with pytest.raises(TexforceError, match="too many gradients were not finite: 5 in a row"):
        step(math.nan)
    assert parameter.tolist() == moved


@pytest.mark.parametrize(("finite", "ends"), [(1, True), (2, False)])
def test_gradients_of_which_more_than_a_third_is_not_finite_end_the_run(finite: int, ends: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimisation = Optimisation([parameter], OptimiserSettings(0.1, 100))
    with pytest.raises(TexforceError, match="more than a third") if ends else nullcontext():
        for index in range(20 * (finite + 1)):
            parameter.grad = torch.full((3,), 1.0 if index % (finite + 1) else math.nan)
            optimisation.step()


def test_lost_gradients_are_counted_on_after_a_resume() -> None:
    def made() -> tuple[torch.nn.Parameter, Optimisation]:
        parameter = torch.nn.Parameter(torch.ones(3))
        return parameter, Optimisation([parameter], OptimiserSettings(learning_rate=0.1, updates=50))

    parameter, before = made()
    for _ in range(MOST_LOST - 1):
        parameter.grad = torch.full((3,), math.nan)
        before.step()
    parameter, after = made()
    after.load(before.tensors(), before.numbers())
    parameter.grad = torch.full((3,), math.nan)
    with pytest.raises(TexforceError, match="too many gradients were not finite: 5 in a row"):
        after.step()


def test_an_epoch_counts_the_updates_that_it_passed_over_and_steers_no_rate_by_the_others(pipeline: Any) -> None:
    algorithm = make(pipeline, update_batch=4, kl_target=1.0)
    real, calls = algorithm.optimisation.step, []

    def poisoned() -> float:
        calls.append(1)
        if len(calls) == 2:
            algorithm.optimisation.parameters[0].grad.fill_(math.nan)  # type: ignore[union-attr]
        return real()

    algorithm.optimisation.step = poisoned  # type: ignore[method-assign]
    report = algorithm.run_epoch(0)
    assert report.skipped_updates == 1 and len(calls) > 2
    assert math.isfinite(report.grad_norm) and math.isfinite(report.approx_kl)
    assert any("passed over" in text for text in report.warnings)
    assert algorithm.optimisation.base_rate == 1e-2
    algorithm.run_epoch(1)
    assert algorithm.optimisation.base_rate == pytest.approx(1.5e-2)


def test_steps_that_would_begin_beyond_the_last_timestep_are_too_many(pipeline: Any) -> None:
    config = pipeline.scheduler.config
    assert (config.num_train_timesteps, config.timestep_spacing, config.steps_offset) == (1300, "leading", 1)
    policy = Policy(pipeline, Denoising(1299))
    assert max(policy.schedule.timesteps) == 1299
    with pytest.raises(UsageError, match="1300 denoising steps are too many; this model has 1299: use --steps 1299 or"):
        Policy(pipeline, Denoising(1300))
    with pytest.raises(UsageError, match=r"1301 denoising steps are too many; .*: use --eval-steps 1299"):
        policy.in_steps(1301)


def test_pictures_of_other_steps_are_those_of_a_policy_that_always_has_them(pipeline: Any) -> None:
    policy, other = Policy(pipeline, Denoising(6)), Policy(pipeline, Denoising(9))
    before = draw(policy, ["a cat"], [3], batch=1)
    with policy.in_steps(9):
        assert (draw(policy, ["a cat"], [3], batch=1) == draw(other, ["a cat"], [3], batch=1)).all()
    after = draw(policy, ["a cat"], [3], batch=1)
    assert (after == before).all() and not (after == draw(other, ["a cat"], [3], batch=1)).all()


def test_the_learning_rate_by_hand() -> None:
    factors = [learning_rate_factor(step, 10, 0.2, "cosine") for step in range(11)]
    assert factors[:3] == [0.5, 1.0, 1.0]  # never 0 at first
    assert factors[6] == pytest.approx(0.5)
    assert factors[10] == pytest.approx(0.0)
    assert [learning_rate_factor(step, 4, 0.0, "linear") for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_the_average_of_the_weights_by_hand() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimisation = Optimisation([parameter], OptimiserSettings(1.0, 10, weight_decay=0, ema=0.75))
    parameter.grad = torch.ones(1)
    optimisation.step()  # Adam's first step: -1
    assert parameter.item() == pytest.approx(-1.0, abs=1e-6)
    with optimisation.averaged():
        assert parameter.item() == pytest.approx(-0.25, abs=1e-6)
    assert parameter.item() == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "first:0",
        "first:x",
        "first:+4",
        "first: 4",
        "first:1_0",
        "random:0",
        "random:1.5",
        "window:",
        "every",
        "all:3",
        "random:nan",
    ],
)
def test_train_steps_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        TrainSteps.parse(text)


def test_which_steps_are_trained() -> None:
    rng = np.random.default_rng(0)
    stochastic = list(range(9))
    assert TrainSteps.parse("first:3").choose(stochastic, 2, rng).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert TrainSteps.parse("all").choose(stochastic, 1, rng).flatten().tolist() == stochastic
    random = TrainSteps.parse("random:0.5").choose(stochastic, 64, rng)
    assert random.shape == (4, 64)
    assert all(len(set(random[:, i].tolist())) == 4 for i in range(64))
    assert TrainSteps.parse("random:0.5").shares(9) == [4 / 9] * 9
    assert TrainSteps.parse("first:3").shares(4) == [1.0, 1.0, 1.0, 0.0]
    assert len({tuple(random[:, i].tolist()) for i in range(64)}) > 8
    assert TrainSteps.parse("window:2").shares(4) == [1.0, 1.0, 0.0, 0.0]
    assert TrainSteps.parse("window:3").window([2, 3, 5, 7]) == [2, 3, 5]
    assert TrainSteps.parse("window:99").window(stochastic) == stochastic
    assert TrainSteps.parse("window:2").choose(stochastic[1:3], 2, rng).tolist() == [[s, s] for s in stochastic[1:3]]
    assert TrainSteps.parse("first:2").window(stochastic) is None


@pytest.mark.parametrize("unconditional", ["trained", "snapshot", "base"])
def test_the_kl_term_compares_with_the_base_whatever_embeds_the_empty_prompt(pipeline: Any, unconditional: str) -> None:
    algorithm = make(pipeline, guidance=3.0, unconditional=unconditional, kl_weight=1.0)
    texts = ["a cat"] * 4
    plain = Policy(pipeline, Denoising(6, 3.0))
    assert algorithm.policy.adapter is not None
    with algorithm.policy.adapter.disabled():
        expected_embeddings = plain.embed(texts)
    for parameter in algorithm.policy.adapter.parameters():
        parameter.data += 0.05
    algorithm.policy.snapshot_unconditional()
    drawn = algorithm._draw(0, range(4), texts)
    images, step = torch.arange(4), torch.zeros(4, dtype=torch.long)
    reference = algorithm._reference(texts)
    assert reference is not None
    with torch.no_grad(), algorithm.policy.adapter.disabled():
        found = algorithm._reference_mean(drawn, images, step, reference)
        output, _ = plain.output(drawn.latents[0], 0, expected_embeddings)
        expected = plain.schedule.mean(drawn.latents[0], output, 0)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("where", ["drawing", "learning"])
def test_a_full_memory_halves_the_micro_batch_and_changes_nothing_but_rounding(where: str) -> None:
    from texforce_cli.diffusion.models import load_pipeline, resolve_model

    class Full(DDPO):
        """Has room for two images; learning fails after the first step of a pass, whose gradients are there by then."""

        losses = 0

        def _draw(self, epoch: int, indices: Any, prompts: Any) -> Any:
            if where == "drawing" and len(indices) > 2:
                raise torch.OutOfMemoryError("full")
            return super()._draw(epoch, indices, prompts)

        def _loss(self, drawn: Any, images: Any, *rest: Any) -> Any:
            self.losses += 1
            if where == "learning" and len(images) > 2 and self.losses > 1:
                raise torch.OutOfMemoryError("full")
            return super()._loss(drawn, images, *rest)

    found, said = [], []
    for kind in (DDPO, Full):
        pipeline = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32")
        algorithm = make(pipeline, kind, train="both")
        reports = [algorithm.run_epoch(epoch) for epoch in range(2)]
        said.append([text for report in reports for text in report.warnings])
        assert algorithm.policy.adapter is not None
        found.append(torch.cat([p.detach().flatten() for p in algorithm.policy.adapter.parameters()]))
    assert said[0] == []
    assert said[1] == [
        "the memory of cpu was too full for 4 images at once: it goes on with 2, and the result differs by rounding only"
    ]
    assert algorithm.state_dict()["micro_batch"] == 2
    assert ((found[0] - found[1]).norm() / found[0].norm()).item() < 1e-3


@pytest.mark.parametrize(("room", "found"), [(3, 2), (5, 4), (100, 8)])
def test_auto_finds_the_largest_micro_batch_that_a_pass_fits_in(pipeline: Any, room: int, found: int) -> None:
    passes = []

    class Small(DDPO):
        """Has room for `room` images in a pass with gradients."""

        def _loss(self, drawn: Any, images: Any, *rest: Any) -> Any:
            passes.append(len(images))
            if len(images) > room:
                raise torch.OutOfMemoryError("full")
            return super()._loss(drawn, images, *rest)

    algorithm = make(pipeline, Small, micro_batch=1, fit_micro_batch=True)  # an update has 12 images: never 16
    adapter = algorithm.policy.adapter
    assert adapter is not None
    assert algorithm.preflight().micro_batch == algorithm.micro_batch == found
    assert all(p.grad is None or not p.grad.any() for p in adapter.parameters())
    begun = len(passes)
    algorithm.run_epoch(0)
    assert max(passes[begun:]) == found

    others = make(pipeline, Small, micro_batch=1, fit_micro_batch=True)
    others.load_state_dict(make(pipeline, Small, micro_batch=1, fit_micro_batch=True).state_dict())
    assert others.preflight().micro_batch == found  # a new run that takes up another's beginning fits as well

    resumed = make(pipeline, Small, micro_batch=1, fit_micro_batch=True)
    resumed.load_state_dict(algorithm.state_dict())
    begun = len(passes)
    assert resumed.preflight().micro_batch == found
    assert len(passes) == begun  # what was found holds for the whole run


def test_auto_folds_steps_into_the_room_that_the_images_leave_and_gives_them_up_first(pipeline: Any) -> None:
    room, passes = [24], []

    class Small(DDPO):
        """Has room for so many images and steps in a pass with gradients."""

        def _loss(self, drawn: Any, images: Any, *rest: Any) -> Any:
            passes.append(len(images))
            if len(images) > room[0]:
                raise torch.OutOfMemoryError("full")
            return super()._loss(drawn, images, *rest)

    def made() -> DDPO:
        return make(pipeline, Small, micro_batch=1, update_batch=8, steps="all", fit_micro_batch=True, timestep_batch=0)

    algorithm = made()
    found = algorithm.preflight()
    assert (found.micro_batch, found.timestep_batch) == (8, 2)  # an update has 8 images, and twice 16 are too many
    passes.clear()
    algorithm.run_epoch(0)
    assert set(passes) == {16, 8}  # updates of 8 and of 4 images
    resumed = made()
    resumed.load_state_dict(algorithm.state_dict())
    assert (resumed.micro_batch, resumed.timestep_batch) == (8, 2)
    room[0] = 6
    report = resumed.run_epoch(1)
    assert (resumed.micro_batch, resumed.timestep_batch) == (4, 1)
    assert ["16 images at once" in text or "8 images at once" in text for text in report.warnings] == [True, True]


def test_steps_that_do_not_keep_the_ratio_together_are_taken_one_by_one(pipeline: Any) -> None:
    class Rough(DDPO):
        """Rounds otherwise in passes of more than 4."""

        def _log_prob(self, drawn: Any, images: Any, *rest: Any) -> Any:
            log_prob, mean = super()._log_prob(drawn, images, *rest)
            return log_prob + 1e-3 * (len(images) > 4), mean

    found = make(pipeline, Rough, micro_batch=4, timestep_batch=0).preflight()
    assert (found.timestep_batch, found.ok) == (1, True)
    found = make(pipeline, Rough, micro_batch=4, timestep_batch=2).preflight()  # asked for: it is for the user to say
    assert (found.timestep_batch, found.ok) == (2, False)


def test_the_ratio_is_measured_at_the_micro_batch_that_trains(pipeline: Any) -> None:
    algorithm = make(pipeline, micro_batch=1, update_batch=4, fit_micro_batch=True)
    sizes: list[int] = []
    log_prob = algorithm._log_prob

    def measured(drawn: Any, images: torch.Tensor, *rest: Any) -> Any:
        sizes.append(len(images))
        return log_prob(drawn, images, *rest)

    algorithm._log_prob = measured  # type: ignore[method-assign]
    assert algorithm.preflight().micro_batch == 4
    steps = len(algorithm.policy.schedule.stochastic)
    assert sizes == [2, 4, *[4] * 2 * steps]  # two passes to fit, then both micro-batches at every step


def test_of_several_processes_the_worst_preflight_counts(pipeline: Any) -> None:
    class Pair(Team):
        """This process and another one, which has less room and whose third step and gradient are wrong."""

        def each(self, value: Any) -> list[Any]:
            if isinstance(value, tuple):
                return [value, (2, 1)]
            steps = tuple({**step, "ratio_error": 0.5 * (i == 2)} for i, step in enumerate(value.steps))
            return [value, replace(value, ratio_error=0.5, steps=steps, micro_batch=2, gradient_error=0.7)]

    algorithm = make(pipeline, micro_batch=1, update_batch=4, fit_micro_batch=True)
    algorithm.team = Pair()
    found = algorithm.preflight()
    assert (found.ratio_error, found.gradient_error) == (0.5, 0.7) and not found.ratio_ok and not found.gradient_ok
    assert [step["ratio_error"] > 0.1 for step in found.steps] == [i == 2 for i in range(6)]
    assert found.micro_batch == algorithm.micro_batch == 2


def test_a_memory_too_small_for_one_image_is_an_error(pipeline: Any) -> None:
    class Full(DDPO):
        def _draw(self, epoch: int, indices: Any, prompts: Any) -> Any:
            raise torch.OutOfMemoryError("full")

    algorithm = make(pipeline, Full)
    with pytest.raises(torch.OutOfMemoryError):
        algorithm.run_epoch(0)
    assert algorithm.micro_batch == 1
