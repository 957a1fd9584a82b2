from diffusers import StableDiffusionPipeline

from texforce_cli.tiny import WEIGHTS, manifest, weights_sha256


def test_the_manifest_names_these_weights() -> None:
    assert manifest()["sha256"] == weights_sha256()
    assert manifest()["version"]


def test_the_embedded_model_is_a_plain_pipeline_and_small() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None)
    assert pipe.unet.config.sample_size == 16
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 20e6
