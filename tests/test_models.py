"""From a name to a pipeline: aliases, folders old and new, one-file checkpoints, the Hub's cache, and every refusal."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from small_models import small_pipeline
from transformers import CLIPTextConfig, CLIPTextModel

from texforce_cli import tiny
from texforce_cli.cli.app import run
from texforce_cli.diffusion import single_file
from texforce_cli.diffusion.models import ModelSource, fingerprint, load_pipeline, native_size, resolve_model
from texforce_cli.diffusion.policy import Denoising, Policy
from texforce_cli.diffusion.sampler import draw, rollout
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.quiet import quiet
from texforce_cli.workflows.plan import plan
from texforce_cli.workflows.run_folder import RunFolder

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
KEYS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FULL_PROMPT = [49406, 320, 1125, 539, 320, 2368, 49407]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def load(name: str | Path | ModelSource, **more: Any) -> Any:
    source = name if isinstance(name, ModelSource) else resolve_model(str(name))
    return load_pipeline(source, device=torch.device("cpu"), **{"precision": "fp32", **more})


def refused(what: str | Path | ModelSource, kind: type[TexforceError] = TexforceError) -> str:
    """The sentence with which a model is refused: one line, with a remedy, without the path to the model."""
    with pytest.raises(kind) as caught:
        load(what)
    assert caught.value.hint
    text = str(caught.value)
    assert "\n" not in text
    assert str(Path(what).parent if isinstance(what, Path) else tiny.WEIGHTS) not in text
    return text


def picture(pipeline: Any, steps: int = 2) -> Any:
    return draw(Policy(pipeline, Denoising(steps=steps, guidance=2.0)), ["a red cat", "two dogs"], [1, 2], batch=2)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be edited."""
    return Path(shutil.copytree(tiny.WEIGHTS, tmp_path / "my.model"))


@pytest.fixture(scope="module")
def reference() -> Any:
    return picture(load("tiny"))


# names


@pytest.mark.parametrize("alias", ["sd14", "sd15", "sd21", "sd21-base"])
def test_aliases_are_pinned_and_the_repository_means_the_same(alias: str) -> None:
    source = resolve_model(alias)
    assert (source.name, source.kind, source.family) == (alias, "hub", "sd")
    assert re.fullmatch(r"[0-9a-f]{40}", source.revision or "")
    assert resolve_model(source.location) == source == resolve_model(f"{source.location}@{source.revision}")
    assert resolve_model(f"{source.location}@main").name == source.location


def test_hub_ids_take_a_revision() -> None:
    source = resolve_model("someone/a-model@v2")
    assert (source.name, source.location, source.revision) == ("someone/a-model", "someone/a-model", "v2")
    assert resolve_model("someone/a-model").revision == "main"


def test_names_of_folders_and_files_are_bare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for given in (str(folder), "my.model", "./my.model/", "my.model/../my.model"):
        source = resolve_model(given)
        assert (source.name, source.short_name, source.location) == ("my.model", "my.model", str(folder))
    monkeypatch.chdir(folder)
    assert resolve_model(".").name == "my.model"


@pytest.mark.parametrize(
    ("typo", "meant"), [("tinny", "tiny"), ("sd1.5", "sd15"), ("sd21base", "sd21-base"), ("/no/such/folder", None)]
)
def test_did_you_mean(typo: str, meant: str | None) -> None:
    message = refused(typo, UsageError)
    assert f"'{typo}'" in message and "FILE" not in message
    assert ("did you mean" in message) == bool(meant) and (not meant or f"'{meant}'" in message)


@pytest.mark.parametrize(
    ("repository", "alias"),
    [
        ("runwayml/stable-diffusion-v1-5", "sd15"),
        ("stabilityai/stable-diffusion-2-1@main", "sd21"),
        ("stabilityai/stable-diffusion-2-1-base", "sd21-base"),
        ("stabilityai/stable-diffusion-2-base", "sd21-base"),
    ],
)
def test_repositories_that_were_taken_down_name_their_heir(repository: str, alias: str) -> None:
    message = refused(repository, UsageError)
    assert "taken down" in message and f"--model {alias} ({resolve_model(alias).location})" in message


@pytest.mark.parametrize(
    "name", ["stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/sdxl-turbo", "SDXL", "a/SD-XL"]
)
def test_sdxl_is_refused_by_name(name: str) -> None:
    assert f"'{name}' is SDXL" in refused(name, UsageError)


@pytest.mark.parametrize(
    ("memory", "name", "why"), [(None, "tiny", "no CUDA"), (8e9, "tiny", "8 GB"), (24e9, "sd15", "24 GB")]
)
def test_the_default_and_its_reason(memory: float | None, name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: memory is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    source = resolve_model("auto")
    assert source.name == name and why in source.reason
    assert (source.location, source.revision) == (resolve_model(name).location, resolve_model(name).revision)


# folders


def test_a_folder_draws_as_the_model_it_was_copied_from(folder: Path, reference: Any) -> None:
    assert np.array_equal(picture(load(folder)), reference)
    assert len(np.unique(reference)) > 16


def _no_index(path: Path) -> None:
    (path / "model_index.json").unlink()


def _damaged_index(path: Path) -> None:
    (path / "model_index.json").write_text('{"_class_name": ')


def _of_class(name: str) -> Callable[[Path], None]:
    return lambda path: edit(path / "model_index.json", lambda index: index.update(_class_name=name))


def _without(part: str) -> Callable[[Path], None]:
    return lambda path: (path / part).unlink()


def _pickled(path: Path) -> None:
    torch.save(load_file(path / TEXT), path / "text_encoder" / "pytorch_model.bin")
    (path / TEXT).unlink()


def _cut(part: str) -> Callable[[Path], None]:
    return lambda path: (path / part).write_bytes((path / part).read_bytes()[:100_000])


def _lacks(part: str, key: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        weights = load_file(path / part)
        del weights[key]
        save_file(weights, path / part, metadata={"format": "pt"})

    return change


def _no_tokenizer(path: Path) -> None:
    shutil.rmtree(path / "tokenizer")


def _prediction(kind: str, **more: Any) -> Callable[[Path], None]:
    return lambda path: edit(
        path / "scheduler" / "scheduler_config.json", lambda config: config.update(prediction_type=kind, **more)
    )


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_no_index, "'my.model' holds no pipeline (there is no model_index.json)"),
        (_damaged_index, "model_index.json of 'my.model' is damaged"),
        (_of_class("StableDiffusionXLPipeline"), "'my.model' is SDXL"),
        (_of_class("StableDiffusionInpaintPipeline"), "is a StableDiffusionInpaintPipeline"),
        (_without(UNET), "'my.model' has no weights for its unet"),
        (_without(TEXT), "'my.model' has no weights for its text_encoder"),
        (_without("unet/config.json"), "no file named config.json found in directory unet"),
        (_pickled, "the text_encoder of 'my.model' is saved as a pickle (.bin)"),
        (_cut(UNET), "'my.model' could not be loaded"),
        (_cut(TEXT), "'my.model' could not be loaded"),
        (_lacks(UNET, "conv_in.weight"), "'my.model' lacks 'unet.conv_in.weight';"),
        (_lacks(TEXT, "text_model.final_layer_norm.bias"), "'my.model' lacks 'text_encoder.final_layer_norm.bias';"),
        (_no_tokenizer, "the tokenizer of 'my.model' knows no words"),
        (_prediction("flow"), "'my.model' predicts 'flow'"),
        (_prediction("epsilon", rescale_betas_zero_snr=True), "zero terminal SNR with epsilon"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(folder: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(folder)
    assert says in refused(folder)


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-that-name/model", "~nobody-of-that-name/model.safetensors"])
def test_a_path_that_cannot_be_is_no_model(name: str) -> None:
    with pytest.raises(UsageError):
        resolve_model(name)


@pytest.mark.parametrize("safety_checker", [["stable_diffusion", "StableDiffusionSafetyChecker"], [None, None], None])
def test_folders_of_older_libraries_draw_the_same(
    folder: Path, reference: Any, safety_checker: list[str] | None
) -> None:
    """As diffusers 0.20 and transformers 4.30 wrote them: fewer keys, other names, the slow tokenizer's files."""

    def index(content: dict[str, Any]) -> None:
        for name in ("image_encoder", "_name_or_path", "safety_checker"):
            content.pop(name, None)
        content |= {"_diffusers_version": "0.20.0", "requires_safety_checker": safety_checker is not None}
        content["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]  # a class that is gone
        if safety_checker:
            content["safety_checker"] = safety_checker

    def keep(*names: str) -> Callable[[dict[str, Any]], None]:
        def change(content: dict[str, Any]) -> None:
            for name in set(content) - {"_class_name", *names}:
                del content[name]
            content["_diffusers_version"] = "0.20.0"

        return change

    edit(folder / "model_index.json", index)
    edit(
        folder / "unet" / "config.json",
        keep(
            *"act_fn attention_head_dim block_out_channels cross_attention_dim down_block_types in_channels".split(),
            *"layers_per_block norm_num_groups out_channels sample_size up_block_types".split(),
        ),
    )
    edit(
        folder / "vae" / "config.json",
        keep(
            *"act_fn block_out_channels decoder_block_out_channels encoder_block_out_channels latent_channels".split(),
            *"num_decoder_blocks num_encoder_blocks scaling_factor".split(),
        ),
    )
    edit(
        folder / "scheduler" / "scheduler_config.json",
        keep(
            *"beta_end beta_schedule beta_start clip_sample num_train_timesteps prediction_type".split(),
            *"set_alpha_to_one steps_offset".split(),
        ),
    )
    edit(
        folder / "text_encoder" / "config.json",
        lambda c: c.update(transformers_version="4.30.2", torch_dtype=c.pop("dtype"), dropout=0.0),
    )
    weights = load_file(folder / TEXT)
    weights["text_model.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(weights, folder / TEXT, metadata={"format": "pt"})
    words = folder / "tokenizer"
    bpe = json.loads((words / "tokenizer.json").read_text())["model"]
    (words / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    (words / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (words / "tokenizer.json").unlink()
    keys = "bos_token eos_token unk_token pad_token model_max_length tokenizer_class".split()
    config = json.loads((words / "tokenizer_config.json").read_text())
    (words / "tokenizer_config.json").write_text(json.dumps({key: config[key] for key in keys}))

    assert np.array_equal(picture(load(folder)), reference)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_prediction_and_spacing_draws_and_as_diffusers_does(folder: Path, prediction: str, spacing: str) -> None:
    _prediction(prediction, timestep_spacing=spacing)(folder)
    pipeline = load(folder)
    policy = Policy(pipeline, Denoising(steps=4, guidance=2.0, eta=0.0))
    trajectory = rollout(policy, ["a red cat"], [5])
    assert trajectory.latents.isfinite().all()
    assert trajectory.images.shape == (1, 64, 64, 3)
    if spacing == "linspace":
        return  # its grid is not regular: diffusers steps by 1000 // T all the same, we step to the next of the list
    theirs = pipeline(
        "a red cat", num_inference_steps=4, guidance_scale=2.0, eta=0.0, latents=trajectory.latents[0], output_type="np"
    ).images
    assert np.abs(theirs * 255 - trajectory.images).max() <= 1.01


def test_trailing_with_zero_terminal_snr_draws_finite_pictures(folder: Path) -> None:
    _prediction("v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)(folder)
    policy = Policy(load(folder), Denoising(steps=3, guidance=2.0))
    assert rollout(policy, ["a red cat"], [5]).latents.isfinite().all()


def test_schedulers_that_clip_do_not_clip_here(folder: Path) -> None:
    """Clipping has no place in the density of Eq. (1)."""
    _prediction("epsilon", clip_sample=True, thresholding=True)(folder)
    config = load(folder).scheduler.config
    assert (config.clip_sample, config.thresholding, config.prediction_type) == (False, False, "epsilon")


def test_a_safety_checker_that_is_not_there_is_said_before_drawing(folder: Path) -> None:
    with pytest.raises(TexforceError, match="without a safety checker"):
        load(folder, safety_checker=True)


def test_loading_says_nothing() -> None:
    code = (
        "import torch\nfrom texforce_cli.diffusion.models import load_pipeline, resolve_model\n"
        "import texforce_cli.diffusion.adapters\n"
        "load_pipeline(resolve_model('tiny'), device=torch.device('cpu'), precision='fp32')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_libraries_speak_again_after_loading() -> None:
    transformers_logging = pytest.importorskip("transformers.utils.logging")
    diffusers_logging = pytest.importorskip("diffusers.utils.logging")
    before = [(m.get_verbosity(), m.is_progress_bar_enabled()) for m in (transformers_logging, diffusers_logging)]
    with quiet():
        assert not diffusers_logging.is_progress_bar_enabled() and transformers_logging.get_verbosity() >= 50
    assert before == [
        (m.get_verbosity(), m.is_progress_bar_enabled()) for m in (transformers_logging, diffusers_logging)
    ]


# the Hub, as its cache on this machine; HF_HUB_OFFLINE is set for all tests


@pytest.fixture
def cached(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded model as the downloaded branch `main` of someone/a-model."""
    cache = tmp_path / "cache"
    repository = cache / "models--someone--a-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_cached_repository_loads_offline_and_is_recorded_by_commit(
    cached: Path, revision: str, reference: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = resolve_model(f"someone/a-model{revision}")
    assert np.array_equal(picture(load(source)), reference)
    assert fingerprint(source) == {"revision": COMMIT}
    assert not caplog.records


@pytest.mark.parametrize("place", ["folder", "hub"])
@pytest.mark.parametrize("parts", [(UNET, TEXT, VAE), (TEXT,), (VAE,)])
def test_components_that_are_there_in_fp16_alone(
    cached: Path, folder: Path, reference: Any, place: str, parts: tuple[str, ...]
) -> None:
    home = cached if place == "hub" else folder
    for part in parts:
        (home / part).rename((home / part).with_suffix(".fp16.safetensors"))
    assert np.array_equal(picture(load("someone/a-model" if place == "hub" else folder)), reference)


def test_a_run_on_a_branch_goes_on_with_the_commit_that_it_began_with(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--samples-per-epoch 4 --group-size 4 --micro-batch 4 --grad-accum 1 --steps 2 --epochs 1 --eval-images 0"
    command = ["train", "--reward", "brightness", "--model", "someone/a-model", "--device", "cpu", *small.split()]
    assert run([*command, "--out", str(tmp_path / "a")]) == 0
    begun = RunFolder(tmp_path / "a")
    record = begun.read_record()
    assert (record["config"]["model"], record["model"]["revision"]) == (f"someone/a-model@{COMMIT}", COMMIT)
    moved = cached.parent / COMMIT[::-1]
    cached.rename(moved)
    (cached.parents[1] / "refs" / "main").write_text(moved.name)
    for model in (f"someone/a-model@{COMMIT}", "someone/a-model@main"):  # the latter as older runs have it
        begun.write_record({**record, "config": {**record["config"], "model": model}})
        assert run(["train", "--resume", str(begun.path)]) == 1
        assert f"the model 'someone/a-model@{COMMIT}' is not on this machine" in capsys.readouterr().err
        assert begun.read_record()["model"]["revision"] == COMMIT
    assert run(["train", "--resume", str(begun.path), "--model", "someone/a-model"]) == 1  # its own commit is meant
    assert run(["train", "--resume", str(begun.path), "--model", "someone/a-model@main"]) == 2
    assert f"begun with other options: model (someone/a-model@{COMMIT}" in capsys.readouterr().err


def test_the_memory_counts_pictures_of_the_size_that_a_model_draws(cached: Path, folder: Path) -> None:
    for unet in (cached / "unet", folder / "unet"):
        config = json.loads((unet / "config.json").read_text())
        (unet / "config.json").write_text(json.dumps({**config, "sample_size": 96}))
    names = ("someone/a-model@main", str(folder), f"{resolve_model('sd21').location}@main", "someone/another", "sd15")
    assert [native_size(resolve_model(name)) for name in names] == [768, 768, 768, 512, 512]
    flags = {"reward": ["brightness"], "device": "cpu", "micro_batch": 1, "precision": "fp32"}
    pixels = [plan({**flags, "model": name}).cost()["computed_petaflop"] for name in names]
    assert pixels[0] == pixels[1] == pixels[2] == pytest.approx(2.25 * pixels[4])


def test_offline_names_the_repository_the_command_and_the_embedded_model() -> None:
    source = resolve_model("sd15")
    message = refused(source)
    assert (
        f"'{source.location}@{source.revision}' is not on this machine, or not whole, and HF_HUB_OFFLINE is set"
        in message
    )
    assert f"`hf download {source.location} --revision {source.revision} " in message and "--model tiny" in message


def test_the_command_fetches_what_loading_needs_and_not_the_rest() -> None:
    patterns = re.findall(r'--include "([^"]+)"', refused(resolve_model("sd15")))
    needed = [path.relative_to(tiny.WEIGHTS).as_posix() for path in tiny.WEIGHTS.rglob("*") if path.is_file()]
    needed += ["tokenizer/vocab.json", "tokenizer/merges.txt"]
    rest = ["v1-5-pruned.ckpt", "v1-5-pruned-emaonly.safetensors", "unet/diffusion_pytorch_model.bin"]
    rest += ["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"]
    assert set(filter_repo_objects(needed + rest, allow_patterns=patterns)) == set(needed)
    patterns = re.findall(r'--include "([^"]+)"', refused(resolve_model("someone/in-fp16")))
    assert list(filter_repo_objects(rest[:-1], allow_patterns=patterns)) == rest[-2:-1]


def test_an_incomplete_download_is_refused_without_the_path_of_the_cache(cached: Path) -> None:
    (cached / UNET).unlink()
    message = refused(resolve_model("someone/a-model"))
    assert (
        "'someone/a-model@main' is not on this machine, or not whole" in message
        and "hf download someone/a-model" in message
    )
    assert str(cached) not in message


def test_a_cached_repository_of_another_pipeline_is_refused_by_name(cached: Path) -> None:
    _of_class("StableDiffusionXLPipeline")(cached)
    assert "'someone/a-model' is SDXL" in refused(resolve_model("someone/a-model"))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (errors.GatedRepoError, ["is gated", "accept its licence", "hf auth login", "--model tiny"]),
        (errors.RepositoryNotFoundError, ["no repository 'someone/a-model'", "hf auth login"]),
        (errors.RevisionNotFoundError, ["'someone/a-model' has no revision 'main'"]),
        (errors.RemoteEntryNotFoundError, ["'someone/a-model@main' holds no pipeline"]),
    ],
)
@pytest.mark.parametrize(
    "boundary", ["huggingface_hub.hf_hub_download", "diffusers.StableDiffusionPipeline.from_pretrained"]
)
def test_what_the_hub_answers_becomes_one_sentence(
    cached: Path, monkeypatch: pytest.MonkeyPatch, boundary: str, error: type[Exception], says: list[str]
) -> None:
    def answer(*_: Any, **__: Any) -> None:
        raise error("a long answer\nover lines", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(boundary, answer)
    message = refused(resolve_model("someone/a-model"))
    for part in says:
        assert part in message


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any, **__: Any) -> None:
        raise errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", answer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    message = refused(resolve_model("sd21"))
    assert "the Hub is not reachable" in message and "hf download sd2-community/" in message and "tiny" in message


# fingerprints


def test_fingerprints(folder: Path, tmp_path: Path) -> None:
    assert fingerprint(resolve_model("tiny")) == tiny.manifest()
    assert fingerprint(resolve_model("sd15")) == {"revision": resolve_model("sd15").revision}
    assert fingerprint(resolve_model(str(folder))) == {
        part: hashlib.sha256((folder / part).read_bytes()).hexdigest() for part in (UNET, TEXT, VAE)
    }
    file = _header_only(tmp_path / "a.safetensors")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert fingerprint(resolve_model(str(file))) == {"a.safetensors": digest}


# one-file checkpoints


def save_configs(pipeline: Any, folder: Path) -> Path:
    """The diffusers config folder of a pipeline, without weights and tokenizer."""
    pipeline.unet.save_config(folder / "unet")
    pipeline.vae.save_config(folder / "vae")
    pipeline.text_encoder.config.save_pretrained(folder / "text_encoder")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    shutil.copy(single_file.CONFIGS / "sd1" / "model_index.json", folder)
    return folder


def original_layout(pipeline: Any, *, open_clip: bool = False) -> dict[str, torch.Tensor]:
    """The weights under the names of CompVis' and Stability's checkpoints, with what else such files hold."""
    text = _open_clip(pipeline.text_encoder) if open_clip else _transformers_clip(pipeline.text_encoder)
    weights = {f"model.diffusion_model.{key}": value for key, value in _original_unet(pipeline.unet).items()}
    weights |= {f"first_stage_model.{key}": value for key, value in _original_vae(pipeline.vae).items()}
    weights |= {f"cond_stage_model.{key}": value for key, value in text.items()}
    weights["alphas_cumprod"] = torch.ones(1000)
    return {key: value.contiguous() for key, value in weights.items()}


def _renamed(key: str, rules: list[tuple[str, str]]) -> str:
    for old, new in rules:
        key = re.sub(old, new, key)
    return key


def _original_unet(unet: Any) -> dict[str, torch.Tensor]:
    stride = unet.config.layers_per_block + 1
    rules = [
        (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{stride * int(m[1]) + int(m[2]) + 1}.0"),
        (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{stride * int(m[1]) + int(m[2]) + 1}.1"),
        (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{stride * (int(m[1]) + 1)}.0.op"),
        (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{stride * int(m[1]) + int(m[2])}.0"),
        (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{stride * int(m[1]) + int(m[2])}.1"),
        (r"^up_blocks\.0\.upsamplers\.0\.conv", f"output_blocks.{stride - 1}.1.conv"),
        (r"^up_blocks\.(\d)\.upsamplers\.0\.conv", lambda m: f"output_blocks.{stride * int(m[1]) + stride - 1}.2.conv"),
        (r"\.norm1\.(?=weight|bias)(?<!blocks\.0\.norm1\.)", ".in_layers.0."),
        (r"\.conv1\.", ".in_layers.2."),
        (r"\.time_emb_proj\.", ".emb_layers.1."),
        (r"\.norm2\.(?=weight|bias)(?<!blocks\.0\.norm2\.)", ".out_layers.0."),
        (r"\.conv2\.", ".out_layers.3."),
        (r"\.conv_shortcut\.", ".skip_connection."),
    ]
    return {_renamed(key, rules): value for key, value in unet.state_dict().items()}


def _original_vae(vae: Any) -> dict[str, torch.Tensor]:
    last = len(vae.config.block_out_channels) - 1
    rules = [
        (r"down_blocks\.(\d)\.resnets\.", r"down.\1.block."),
        (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
        (r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block."),
        (r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{last - int(m[1])}.upsample."),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_(\w)", r"mid.attn_1.\1"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ]
    result = {_renamed(key, rules): value for key, value in vae.state_dict().items()}
    linear = re.compile(r"mid\.attn_1\.(q|k|v|proj_out)\.weight")
    return {key: value[:, :, None, None] if linear.search(key) else value for key, value in result.items()}


def _text_state(encoder: Any) -> dict[str, torch.Tensor]:
    return {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}


def _transformers_clip(encoder: Any) -> dict[str, torch.Tensor]:
    length = encoder.config.max_position_embeddings
    result = {f"transformer.text_model.{key}": value for key, value in _text_state(encoder).items()}
    return result | {"transformer.text_model.embeddings.position_ids": torch.arange(length)[None]}


def _open_clip(encoder: Any) -> dict[str, torch.Tensor]:
    state, width = _text_state(encoder), encoder.config.hidden_size
    rules = [
        (r"^embeddings\.token_embedding", "token_embedding"),
        (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^final_layer_norm", "ln_final"),
        (r"^encoder\.layers\.", "transformer.resblocks."),
        (r"layer_norm(\d)", r"ln_\1"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
        (r"self_attn", "attn"),
    ]
    result = {_renamed(key, rules): value for key, value in state.items() if not re.search(r"[qkv]_proj", key)}
    for layer in range(encoder.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [state[f"encoder.layers.{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            result[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    result |= {"text_projection": torch.eye(width), "logit_scale": torch.tensor(1.0)}
    return {f"model.{key}": value for key, value in result.items()}


def _header_only(path: Path, width: int = 768, metadata: dict[str, str] | None = None, *keys: str) -> Path:
    """A file with the tensors by which a whole checkpoint is known, and no others."""
    names = [*single_file._TEXT_ENCODERS[:1], "first_stage_model.quant_conv.weight", *keys]
    save_file({KEYS: torch.zeros(1, width), **{name: torch.zeros(1) for name in names}}, path, metadata=metadata)
    return path


def assert_same_weights(ours: Any, theirs: Any) -> None:
    for part in ("unet", "text_encoder", "vae"):
        a, b = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), f"{part}.{key}"


@pytest.mark.parametrize("open_clip", [False, True], ids=["SD1 layout", "SD2 layout"])
def test_a_checkpoint_with_a_config_folder_beside_it_is_the_pipeline_it_was_made_from(
    tmp_path: Path, open_clip: bool
) -> None:
    theirs = small_pipeline(use_linear_projection=open_clip)
    theirs.scheduler.register_to_config(prediction_type="v_prediction" if open_clip else "epsilon")
    path = tmp_path / "merge v1.5.safetensors"
    save_file(original_layout(theirs, open_clip=open_clip), path)
    theirs.tokenizer.save_pretrained(save_configs(theirs, tmp_path / "merge v1.5") / "tokenizer")

    source = resolve_model(str(path))
    assert (source.name, source.kind, source.location) == ("merge v1.5", "file", str(path))
    assert "the config folder 'merge v1.5' beside it" in source.reason
    ours = load(source)
    assert_same_weights(ours, theirs)
    assert ours.scheduler.config.prediction_type == theirs.scheduler.config.prediction_type
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    assert np.abs(picture(ours).astype(int) - picture(theirs)).max() <= 1  # other addresses, other roundings
    assert picture(ours).shape == (2, 64, 64, 3)


@pytest.mark.parametrize(
    ("generation", "width", "prediction", "side"),
    [(1, 768, "v_prediction", 8), (2, 1024, "v_prediction", 96), (2, 1024, "epsilon", 64)],
)
def test_a_checkpoint_alone_takes_the_configs_and_the_tokenizer_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generation: int, width: int, prediction: str, side: int
) -> None:
    theirs = small_pipeline(width, 49408, 77).to(dtype=torch.float16)
    theirs.scheduler.register_to_config(prediction_type="sample")  # the file has the last word
    save_configs(theirs, tmp_path / "configs" / f"sd{generation}")
    shutil.copy(single_file.CONFIGS / "bpe_simple_vocab_16e6.txt.gz", tmp_path / "configs")
    monkeypatch.setattr(single_file, "CONFIGS", tmp_path / "configs")
    path = tmp_path / "alone.safetensors"
    save_file(original_layout(theirs, open_clip=generation == 2), path, {"modelspec.prediction_type": prediction})

    ours = load(path, precision="fp16")
    assert_same_weights(ours, theirs)
    assert (ours.scheduler.config.prediction_type, ours.unet.config.sample_size) == (prediction, side)
    assert native_size(resolve_model(str(path))) == 8 * side
    assert ours.tokenizer("a photo of a cat").input_ids == FULL_PROMPT


def meta_modules(generation: int) -> dict[str, Any]:
    """U-Net, text encoder and VAE of the package's configs, in full size and without memory."""
    folder = single_file.CONFIGS / f"sd{generation}"
    with torch.device("meta"):
        return {
            "unet": diffusers.UNet2DConditionModel.from_config(json.loads((folder / "unet/config.json").read_text())),
            "vae": diffusers.AutoencoderKL.from_config(json.loads((folder / "vae/config.json").read_text())),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
        }


@pytest.mark.parametrize(
    ("generation", "parameters", "heads", "text", "side", "prediction"),
    [
        (1, (859_520_964, 123_060_480, 83_653_863), 8, ("quick_gelu", 12, 12), 64, "epsilon"),
        (2, (865_910_724, 340_387_840, 83_653_863), [5, 10, 20, 20], ("gelu", 23, 16), 96, "v_prediction"),
    ],
)
def test_the_configs_of_the_package_build_the_published_models(
    generation: int, parameters: tuple[int, ...], heads: Any, text: tuple[Any, ...], side: int, prediction: str
) -> None:
    modules = meta_modules(generation)
    counts = [sum(p.numel() for p in modules[name].parameters()) for name in ("unet", "text_encoder", "vae")]
    assert counts == list(parameters)
    # what the counts do not show
    unet, vae, encoder = modules["unet"].config, modules["vae"].config, modules["text_encoder"].config
    assert (unet.attention_head_dim, unet.sample_size) == (heads, side)
    assert (encoder.hidden_act, encoder.num_hidden_layers, encoder.num_attention_heads) == text
    assert (vae.scaling_factor, vae.sample_size) == (0.18215, 8 * side)
    scheduler = diffusers.DDIMScheduler.from_pretrained(single_file.CONFIGS / f"sd{generation}" / "scheduler")
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0.0046598, rel=1e-4)  # 1.4 to 2.1 share one schedule
    assert (scheduler.config.steps_offset, scheduler.config.set_alpha_to_one) == (1, False)
    assert scheduler.config.prediction_type == prediction


@pytest.mark.parametrize(("generation", "padding"), [(1, 49407), (2, 0)])
def test_the_tokenizer_of_the_package_gives_clips_ids(generation: int, padding: int) -> None:
    tokenizer = single_file.clip_tokenizer(generation)
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == FULL_PROMPT
    padded = tokenizer("A  photo of a CAT", padding="max_length", truncation=True).input_ids
    assert padded == FULL_PROMPT + [padding] * 70
    assert tokenizer("it's 2 naïve 猫", truncation=True).input_ids == tokenizer("It's 2 NAÏVE 猫").input_ids
    assert tokenizer.decode(tokenizer("naïve 猫").input_ids, skip_special_tokens=True) == "naïve 猫"


def test_the_vocabulary_is_the_one_that_the_readme_names() -> None:
    data = (single_file.CONFIGS / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    assert hashlib.sha256(data).hexdigest() in (single_file.CONFIGS / "README.md").read_text()
    assert gzip.decompress(data).startswith(b'"bpe_simple_vocab_16e6.txt#version: 0.2\n')


@pytest.mark.parametrize(
    ("width", "metadata", "keys", "prediction", "assumed"),
    [
        (768, None, (), "epsilon", False),
        (768, {"modelspec.prediction_type": "v"}, (), "v_prediction", False),
        (768, None, ("v_pred",), "v_prediction", False),
        (1024, None, (), "v_prediction", True),
        (1024, {"modelspec.prediction_type": "epsilon"}, (), "epsilon", False),
        (1024, {"modelspec.prediction_type": "epsilon"}, ("v_pred",), "epsilon", False),
        (1024, {"modelspec.architecture": "stable-diffusion-v2-512"}, (), "epsilon", False),
        (1024, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), "v_prediction", False),
        (1024, {"modelspec.prediction_type": "?"}, (), "v_prediction", True),
    ],
)
def test_what_a_checkpoint_predicts(
    tmp_path: Path,
    width: int,
    metadata: dict[str, str] | None,
    keys: tuple[str, ...],
    prediction: str,
    assumed: bool,
) -> None:
    path = _header_only(tmp_path / "a.safetensors", width, metadata, *keys)
    found = single_file.inspect(path)
    assert (found.generation, found.prediction) == ({768: 1, 1024: 2}[width], prediction)
    reason = resolve_model(str(path)).reason
    assert f"SD {found.generation}.x checkpoint, {prediction}" in reason
    assert ("assumed, a config folder 'a' beside it decides otherwise" in reason) == assumed


@pytest.mark.parametrize(("spread", "prediction", "side"), [(0.05, "epsilon", 512), (0.15, "v_prediction", 768)])
def test_a_weight_tells_what_an_sd2_checkpoint_predicts_whose_header_does_not(
    tmp_path: Path, spread: float, prediction: str, side: int
) -> None:
    path = _header_only(tmp_path / "a.safetensors", 1024)
    save_file({**load_file(path), single_file._TELLING_BIAS: torch.tensor([-spread, spread]).bfloat16()}, path)
    source = resolve_model(str(path))
    assert f"{prediction} by one of its weights, a config folder 'a' beside it" in source.reason
    assert single_file.inspect(path).prediction == prediction and native_size(source) == side


def _bytes(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def _keys(**shapes: tuple[int, ...]) -> Callable[[Path], Any]:
    return lambda path: save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)


def _truncated(path: Path) -> None:
    path.write_bytes(_header_only(path).read_bytes()[:-100])


def _sdxl(path: Path) -> None:
    _header_only(path, 2048)


def _second_encoder(path: Path) -> None:
    _header_only(path, 768, None, "conditioner.embedders.1.model.ln_final.weight")


def _odd_width(path: Path) -> None:
    _header_only(path, 640)


def _inpainting(path: Path) -> None:
    _header_only(path)
    weights = load_file(path) | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1, 9, 1, 1)}
    save_file(weights, path)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (_bytes(b""), "is empty; copy or download it again"),
        (_bytes(b"\n<!DOCTYPE html><html>"), "is a web page"),
        (_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"), "git-lfs pointer"),
        (_bytes(b"PK\x03\x04" + bytes(40)), "is a pickle"),
        (_bytes(b"words and words and words"), "no safetensors file"),
        (_truncated, "is cut short"),
        (_keys(), "no Stable Diffusion checkpoint"),
        (_keys(**{"down_blocks.0.resnets.0.conv1.weight": (1,)}), "no Stable Diffusion checkpoint"),
        (_keys(**{"text_encoder.layers.0.q_proj.lora_A.weight": (1,)}), "is a LoRA, not a model"),
        (_keys(lora_unet_mid_block_attn=(1,)), "is a LoRA, not a model"),
        (_keys(**{"model.diffusion_model.joint_blocks.0.x.weight": (1,)}), "is of another family"),
        (_sdxl, "is SDXL"),
        (_second_encoder, "is SDXL"),
        (_odd_width, "cross-attention of width 640"),
        (_inpainting, "is an inpainting model"),
        (_keys(**{KEYS: (1, 768), "first_stage_model.a": (1,)}), "holds no text encoder"),
        (_keys(**{KEYS: (1, 768), single_file._TEXT_ENCODERS[1]: (1,)}), "holds no VAE"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_sentence(
    tmp_path: Path, write: Callable[[Path], Any], says: str
) -> None:
    path = tmp_path / "a.safetensors"
    write(path)
    message = refused(path)
    assert message.startswith("'a.safetensors' ") and says in message


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    theirs = small_pipeline()
    weights = original_layout(theirs)
    del weights["model.diffusion_model.time_embed.0.weight"]
    del weights["model.diffusion_model.time_embed.0.bias"]
    save_file(weights, tmp_path / "a.safetensors")
    theirs.tokenizer.save_pretrained(save_configs(theirs, tmp_path / "a") / "tokenizer")
    assert "'a' could not be loaded (it lacks weights)" in refused(tmp_path / "a.safetensors")


def test_a_config_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    theirs = small_pipeline()
    save_file(original_layout(theirs), tmp_path / "a.safetensors")
    save_configs(theirs, tmp_path / "a")
    assert "the tokenizer of 'a' knows no words" in refused(tmp_path / "a.safetensors")


def test_a_config_folder_of_another_pipeline_beside_the_file(tmp_path: Path) -> None:
    path = _header_only(tmp_path / "a.safetensors")
    save_configs(small_pipeline(), tmp_path / "a")
    _of_class("StableDiffusionXLPipeline")(tmp_path / "a")
    assert "'a' is SDXL" in refused(path)


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "a.txt"])
def test_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert f"'{name}' is not a .safetensors file" in refused(tmp_path / name, UsageError)


def test_a_file_that_is_not_there() -> None:
    assert "there is no file" in refused("no-such.safetensors", UsageError)


def test_a_link_of_the_hubs_cache_keeps_its_name(tmp_path: Path) -> None:
    blob = tmp_path / "0a1b2c"
    _header_only(blob)
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    source = resolve_model(str(link))
    assert (source.name, source.location) == ("model", str(link))


@pytest.mark.slow
@pytest.mark.parametrize("generation", [1, 2])
def test_a_checkpoint_of_full_size_loads_with_the_configs_of_the_package(tmp_path: Path, generation: int) -> None:
    pipeline = SimpleNamespace(**meta_modules(generation))
    for module in vars(pipeline).values():
        module.to(torch.float16).to_empty(device="cpu")
        for number, value in enumerate(module.state_dict().values()):
            value.fill_(number / 1024)
    path = tmp_path / "full.safetensors"
    save_file(original_layout(pipeline, open_clip=generation == 2), path)
    ours = load(path, precision="fp16")
    assert_same_weights(ours, pipeline)
    path.unlink()
