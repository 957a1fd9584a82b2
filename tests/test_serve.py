"""`texforce gpt4v-rank` against a real server: `transformers serve` with a small LLaVA of random weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from texforce_cli.cli.app import run

pytestmark = pytest.mark.slow
pytest.importorskip("fastapi")

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>"
    "{% endif %}{% endfor %}{% endif %}\n{% endfor %}assistant: "
)


def make_llava(folder: Path) -> None:
    """A model of bytes and 28-pixel pictures that says anything."""
    special = ["<image>", "<s>", "</s>"]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    tokens = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokens.add_special_tokens(special)
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="</s>", image_token="<image>"
    )
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=28, patch_size=14),
        text_config=LlamaConfig(
            **small,
            vocab_size=len(words),
            max_position_embeddings=16384,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=words.index("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of the server, and the name of its model."""
    folder = tmp_path_factory.mktemp("llava")
    make_llava(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", "--host", "127.0.0.1", "--port", str(port)]
    log = (folder / "serve.log").open("wb")
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--dtype", "float32"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=log,
    )
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "serve.log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.kill()
        process.wait()
        log.close()


def test_a_model_that_says_anything_until_it_is_cut_off_is_asked_once_and_never_guessed(
    server: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    prompts = ["a red cat", "two foxes in the park"]
    Path("prompts.txt").write_text("\n".join(prompts))
    for name, seed in (("one", "0"), ("two", "1")):
        assert run(["sample", *prompts, "--model", "tiny", "--steps", "2", "--seeds", seed, "--out", name]) == 0
        rows = [
            {"file_name": path.name, "prompt": prompt, "seed": 0}
            for path, prompt in zip(sorted(Path(name).glob("*.png")), prompts)
        ]
        Path(name, "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["gpt4v-rank", "out", "--images", "one=one", "--images", "two=two", "--prompts", "prompts.txt"]
    command += [
        "--judge",
        f"openai:{server[1]}",
        "--base-url",
        server[0],
        "--max-output-tokens",
        "24",
        "--placebos",
        "0",
    ]
    assert run([*command, "--workers", "2"]) == 3
    (folder,) = Path("out/ranks").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["missing_by_variant"] == {"cut": {"one": 4, "two": 4}}
    lines = [json.loads(line) for line in (folder / "judgments.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["cut"] for line in lines)  # asked again they would be cut off again
    assert all(line["input_tokens"] > 100 for line in lines)  # the server counted text and pictures
    assert summary["answered"] == 0
    assert all(row["all"] is None for row in summary["results"]["alignment"]["mean_rank"].values())
    assert "cut off" in capsys.readouterr().err
    assert run(command) == 3  # nothing is asked again
    assert len((folder / "judgments.jsonl").read_text().splitlines()) == 4
