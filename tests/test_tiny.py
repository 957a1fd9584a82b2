import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from texforce_cli.tiny import WEIGHTS, manifest, weights_sha256


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_the_manifest_names_these_weights() -> None:
    assert manifest()["sha256"] == weights_sha256()
    assert manifest()["version"]


def test_the_embedded_model_is_a_plain_pipeline_and_small() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None)
    assert pipe.unet.config.sample_size == 16
    assert size_of(WEIGHTS) < 20e6
    assert sum(p.numel() for p in pipe.unet.parameters()) == pytest.approx(5.04e6, rel=1e-3)
    assert [0 < size_of(WEIGHTS.parent / judge) < 6e6 for judge in ("clip", "judge")] == [True, True]


def test_the_card_says_what_was_measured() -> None:
    folder = WEIGHTS.parent
    card, measured = (folder / "README.md").read_text(), json.loads((folder / "measured.json").read_text())
    rows = {
        "object": "object",
        "place": "location",
        "colour": "color",
        "colour, held-out pairs": "color, held-out pairs",
        "count": "count",
        "pair of objects": "composition",
        "pair, tinted": "composition, tinted",
    }
    for name, capability in rows.items():
        cells = next(line for line in card.splitlines() if line.startswith(f"| {name} |")).split("|")[2:-1]
        for source, cell in zip(("real", "guidance 3", "guidance 1", "shuffled"), cells, strict=True):
            found = measured["accuracy"][source][capability]
            said = [float(number) for number in cell.split("/")]
            assert said == [pytest.approx(100 * found[judge], abs=0.06) for judge in ("tiny-clip", "tiny-judge")]


def test_the_autoencoder_gives_pictures_of_the_world_back() -> None:
    if not Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf").exists():
        pytest.skip("needs Noto Color Emoji, as tools/tiny does")
    from tools.tiny.measure import CAPABILITIES, real
    from tools.tiny.vae import normalised, psnr

    scenes = [scene for capability in CAPABILITIES for scene in capability.scenes(8)]
    vae = AutoencoderTiny.from_pretrained(WEIGHTS / "vae").eval()
    assert psnr(vae, normalised(torch.from_numpy(real(scenes)))) > 30
