"""LoRA on a live pipeline: what is exported draws what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from lora_files import Made
from small_models import small_pipeline

from texforce_cli.diffusion.adapters import Adapter, stack
from texforce_cli.diffusion.models import load_pipeline, resolve_model
from texforce_cli.diffusion.policy import Denoising, Policy
from texforce_cli.diffusion.sampler import draw
from texforce_cli.errors import TexforceError
from texforce_cli.lora.read import read_lora
from texforce_cli.lora.write import lora_bytes
from texforce_cli.tiny import WEIGHTS
from texforce_cli.workflows.model_card import adapter_bytes
from texforce_cli.workflows.plan import plan

PROMPTS, SEEDS = ["a cat", "two red dogs"], [3, 4]


def tuned(pipeline: Any, train: str = "both", rank: int = 3, alpha: float = 6.0) -> Adapter:
    """A LoRA that changes the pictures, with alpha unequal to the rank."""
    adapter = Adapter.insert(pipeline, train, rank=rank, alpha=alpha, seed=0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapter


def pictures(pipeline: Any, adapter: Adapter | None = None) -> np.ndarray:  # type: ignore[type-arg]
    return draw(Policy(pipeline, Denoising(4, 2.0), adapter=adapter), PROMPTS, SEEDS, batch=2).astype(int)


def scaled(weights: Any, weight: float) -> tuple[str, Any]:
    return "x", {key: value * weight if "lora_B" in key else value for key, value in weights.items()}


def fresh() -> Any:
    return load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32")


@pytest.mark.parametrize("train", ["text-encoder", "unet", "both"])
def test_diffusers_loads_the_file_with_exactly_the_trained_effect(pipeline: Any, tmp_path: Path, train: str) -> None:
    base = pictures(pipeline)
    adapter = tuned(pipeline, train)
    live = pictures(pipeline, adapter)
    assert np.abs(live - base).max() > 20
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(lora_bytes(adapter.export(), {"texforce": "{}"}))
    plain = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None, dtype=torch.float32)
    plain.load_lora_weights(tmp_path)
    assert np.abs(pictures(plain) - live).max() <= 1
    ours = fresh()
    stack(ours, [("x", read_lora(str(tmp_path)).arrays())])
    assert np.abs(pictures(ours) - live).max() <= 1


def test_disabled_is_the_base(pipeline: Any) -> None:
    base = pictures(pipeline)
    adapter = tuned(pipeline)
    with adapter.disabled():
        assert np.array_equal(pictures(pipeline, adapter), base)
    assert not np.array_equal(pictures(pipeline, adapter), base)


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone(pipeline: Any) -> None:
    base = pictures(pipeline)
    torch.manual_seed(123)
    adapter = Adapter.insert(pipeline, "both", rank=4, alpha=4, seed=7)
    assert np.array_equal(pictures(pipeline, adapter), base)
    torch.manual_seed(321)
    again = Adapter.insert(fresh(), "both", rank=4, alpha=4, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters()))
    other = Adapter.insert(fresh(), "both", rank=4, alpha=4, seed=8)
    assert not torch.equal(adapter.parameters()[0], other.parameters()[0])


def test_starting_from_a_lora_of_smaller_rank_is_exact(pipeline: Any) -> None:
    adapter = tuned(pipeline)
    live = pictures(pipeline, adapter)
    second = fresh()
    started = Adapter.insert(second, "both", rank=5, alpha=10, seed=1)
    started.import_(adapter.export(), "x")
    assert np.abs(pictures(second, started) - live).max() <= 1
    small = Adapter.insert(fresh(), "both", rank=2, alpha=2, seed=1)
    with pytest.raises(TexforceError, match="has rank 3, this run has rank 2; use --rank 3"):
        small.import_(adapter.export(), "x")
    with pytest.raises(TexforceError, match="holds no layer"):
        small.import_({}, "x")
    text = Adapter.insert(fresh(), "text-encoder", rank=3, alpha=3, seed=1)
    with pytest.raises(TexforceError, match="layers of 'x' are not trained here; choose --train so that it has all"):
        text.import_(adapter.export(), "x")
    feed_forward = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    with pytest.raises(TexforceError, match=f"1 of the .* are not trained here; no --train has '{feed_forward}': draw"):
        started.import_({**adapter.export(), f"{feed_forward}.lora_A.weight": torch.ones(2, 128)}, "x")


def test_loras_stack_with_weights_that_add_up(pipeline: Any) -> None:
    adapter = tuned(pipeline)
    live = pictures(pipeline, adapter)
    weights = adapter.export()
    halves = fresh()
    stack(halves, [scaled(weights, 0.25), scaled(weights, 0.75)])
    assert np.abs(pictures(halves) - live).max() <= 2
    cancelled = fresh()
    base = pictures(cancelled)
    stack(cancelled, [scaled(weights, 1.0), scaled(weights, -1.0)])
    assert np.abs(pictures(cancelled) - base).max() <= 2


@pytest.mark.parametrize(
    "key", ["unet.mid_block.attentions.9.transformer_blocks.0.attn1.to_q", "text_encoder.text_model.nowhere.q_proj"]
)
def test_a_lora_of_another_model_is_refused(key: str) -> None:
    pipeline = fresh()
    good = tuned(fresh()).export()
    stray = {f"{key}.lora_A.weight": torch.ones(2, 128), f"{key}.lora_B.weight": torch.ones(128, 2)}
    with pytest.raises(TexforceError, match="another base model"):
        stack(pipeline, [("x", good | stray)])
    wrong = {name: torch.ones(3, 77) if "lora_A" in name else value for name, value in good.items()}
    with pytest.raises(TexforceError, match="another base model"):
        stack(fresh(), [("x", wrong)])


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_an_official_folder_changes_the_encoder_by_exactly_what_it_encodes(tmp_path: Path, ending: str) -> None:
    """The published form (`base_model.model.text_model...`, r = alpha = 16) loads nothing in peft under transformers 5.6."""
    ours, encoder = fresh(), fresh().text_encoder
    width = encoder.config.hidden_size
    made = Made()
    for layer in range(len(encoder_layers(encoder))):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            key = f"text_model.encoder.layers.{layer}.self_attn.{name}"
            made.add(
                f"text_encoder.{key}",
                *(f"base_model.model.{key}.lora_{x}.weight" for x in "AB"),
                rank=16,
                shape=(width, width),
            )
    made.tensors = {key: value * np.float32(0.05) for key, value in made.tensors.items()}
    if ending == ".bin":
        torch.save(
            {key: torch.from_numpy(value) for key, value in made.tensors.items()}, tmp_path / "adapter_model.bin"
        )
    else:
        made.save(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16, "lora_alpha": 16}')
    ids = torch.arange(16)[None]
    before = encoder(ids).last_hidden_state
    for layer, block in enumerate(encoder_layers(encoder)):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            delta = made.wanted[f"text_encoder.text_model.encoder.layers.{layer}.self_attn.{name}"] * 0.05**2
            block.self_attn.get_submodule(name).weight.data += torch.from_numpy(delta)
    stack(ours, [("x", read_lora(str(tmp_path), allow_pickle=ending == ".bin").arrays())])
    after = encoder(ids).last_hidden_state
    assert (after - before).abs().max() > 0.1
    assert torch.allclose(ours.text_encoder(ids).last_hidden_state, after, rtol=0, atol=1e-5)


def encoder_layers(encoder: Any) -> Any:
    return getattr(encoder, "text_model", encoder).encoder.layers


@pytest.mark.parametrize("layers", [("fc1", "fc2"), ("fc2", "out_proj")])
def test_a_text_encoder_lora_of_any_of_its_layers_has_its_exact_effect(layers: tuple[str, str]) -> None:
    pipeline, generator = fresh(), torch.Generator().manual_seed(0)
    expected, arrays = {}, {}
    for name, module in pipeline.text_encoder.named_modules():
        if name.endswith(layers):
            a, b = (torch.randn(s, generator=generator) for s in ((2, module.in_features), (module.out_features, 2)))
            arrays |= {f"text_encoder.{name}.lora_A.weight": a, f"text_encoder.{name}.lora_B.weight": b}
            expected[name] = (module, b @ a)
    tokens = torch.arange(12)[None]
    stack(pipeline, [("x", arrays)])
    with torch.no_grad():
        found = pipeline.text_encoder(tokens)[0]
        plain = fresh().text_encoder
        untouched = plain(tokens)[0]
        for name, (_, delta) in expected.items():
            plain.get_submodule(name).weight += delta
        wanted = plain(tokens)[0]
    assert len(expected) == 6 and (wanted - untouched).abs().max() > 0.1
    assert torch.allclose(found, wanted, atol=1e-4)


def test_bare_attention_processors_have_their_exact_effect_on_a_unet(tmp_path: Path) -> None:
    """ReFL-style files, of which diffusers loads nothing today."""
    ours, changed, made = fresh(), fresh().unet, Made()
    for name, module in changed.named_modules():
        block, dot, layer = name.rpartition(".to_")
        if dot and isinstance(module, torch.nn.Linear):
            key = f"{block}.processor.to_{layer.removesuffix('.0')}_lora"
            made.add(f"unet.{name}", f"{key}.down.weight", f"{key}.up.weight", rank=2, shape=tuple(module.weight.shape))
            module.weight.data += 0.1**2 * torch.from_numpy(made.wanted[f"unet.{name}"])
    made.tensors = {key: value * np.float32(0.1) for key, value in made.tensors.items()}
    lora = read_lora(str(made.save(tmp_path / "a.safetensors")))
    torch.manual_seed(0)
    config = ours.unet.config
    inputs = torch.randn(1, config.in_channels, 8, 8), 500, torch.randn(1, 12, config.cross_attention_dim)
    with torch.no_grad():
        before = ours.unet(*inputs)[0]
        stack(ours, [("x", lora.arrays())])
        assert lora.format == "bare attention processors"
        assert (changed(*inputs)[0] - before).abs().max() > 0.1
        assert torch.allclose(ours.unet(*inputs)[0], changed(*inputs)[0], rtol=0, atol=1e-4)


def test_a_loader_that_fails_without_a_word_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **__: Any) -> None:
        raise RuntimeError

    pipeline = fresh()
    monkeypatch.setattr(type(pipeline), "load_lora_weights", silent)
    with pytest.raises(TexforceError, match=r"'x' does not fit this model \(RuntimeError\)"):
        stack(pipeline, [("x", {})])


def test_a_layer_that_loads_but_at_another_scale_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    good = tuned(fresh()).export()
    pipeline = fresh()
    put = type(pipeline).set_adapters

    def half(self: Any, *arguments: Any) -> None:
        put(self, *arguments)
        layer = self.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
        layer.scaling["lora0"] = 0.5

    monkeypatch.setattr(type(pipeline), "set_adapters", half)
    with pytest.raises(TexforceError, match=r"attn1.to_q' of 'x' did not arrive"):
        stack(pipeline, [("x", good)])


@pytest.mark.parametrize(
    ("name", "width", "base"),
    [
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 768, "SD 1.x"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 1024, "SD 2.x"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 768, "SD 1.x"),
    ],
)
def test_a_lora_tells_its_base_also_where_that_is_a_folder(tmp_path: Path, name: str, width: int, base: str) -> None:
    made = plan({"reward": ["brightness"], "model": str(WEIGHTS)})
    weights = {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(8, 2)}
    (tmp_path / "a.safetensors").write_bytes(adapter_bytes(weights, made, 256))
    assert read_lora(str(tmp_path / "a.safetensors")).base == base


@pytest.mark.parametrize("linear", [False, True], ids=["as SD 1.x", "as SD 2.x"])
def test_a_lora_of_all_layers_in_kohyas_names_has_its_exact_effect_on_each_generation(
    tmp_path: Path, linear: bool
) -> None:
    """proj_in and proj_out are convolutions in SD 1.x and linear in SD 2.x."""

    def model() -> Any:
        return small_pipeline(use_linear_projection=linear)

    base, changed, made = model(), model(), Made()
    for prefix, component in (("lora_unet", "unet"), ("lora_te", "text_encoder")):
        for name, module in getattr(base, component).named_modules():
            if not name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0", ".proj_in", ".proj_out", ".q_proj", ".fc2")):
                continue
            outputs, inputs, *kernel = module.weight.shape
            level = "" if component == "unet" or name.startswith("text_model.") else "text_model."
            flat = f"{prefix}_{level}{name}".replace(".", "_")
            made.add(
                f"{component}.{name}",
                f"{flat}.lora_down.weight",
                f"{flat}.lora_up.weight",
                rank=2,
                shape=(outputs, inputs),
                scale=0.25,
                alpha=(f"{flat}.alpha", 0.5),
                kernel=tuple(kernel),
            )
            delta = torch.from_numpy(made.wanted[f"{component}.{name}"]).float().reshape(module.weight.shape)
            getattr(changed, component).get_submodule(name).weight.data += 0.5 * delta
    lora = read_lora(str(made.save(tmp_path / "a.safetensors")))
    ours = model()
    stack(ours, [("x", lora.arrays(lambda component: 0.3)), ("x", lora.arrays(lambda component: 0.2))])

    def outputs_of(pipeline: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        with torch.no_grad():
            return pipeline.unet(latents, 500, pipeline.text_encoder(torch.arange(12)[None])[0])[0]

    assert len(made.wanted) == 16 * 10 + 2 * 2
    assert (outputs_of(changed) - outputs_of(base)).abs().max() > 0.1
    assert torch.allclose(outputs_of(ours), outputs_of(changed), rtol=0, atol=1e-4)
