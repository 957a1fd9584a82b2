"""Whole-process seconds and peak memory of `texforce fuse` against peft's `add_weighted_adapter`, in turns, on LoRAs of two sizes.

    python -m benchmarks.fuse --out FILE.json

texforce: the command, start to end, which also hashes its sources, reads back what it wrote and compares. peft: a script
that imports peft, loads the same two files into layers of the same shapes (without the rest of the model, which would only
cost it more), adds them and saves. disk: a script that reads the bytes of the sources and writes as many as the fused file
has, to the disk and not only to memory. Sizes: the text encoder of SD 1.x (q, k, v, out; ranks 16 and 16), and the attention
and feed-forward layers of SDXL's U-Net (ranks 32 and 32, fp16).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from texforce_cli.files import write_json
from texforce_cli.lora.write import lora_bytes

Shapes = dict[str, tuple[int, int]]
WEIGHTS = (0.7, 0.3)


def text_encoder() -> Shapes:
    """(outputs, inputs) of the layers that TexForce trains in SD 1.x."""
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return {
        f"text_encoder.text_model.encoder.layers.{i}.self_attn.{name}": (768, 768) for i in range(12) for name in names
    }


def sdxl() -> Shapes:
    """(outputs, inputs) of the linear layers in SDXL's transformer blocks, and around them."""
    shapes: Shapes = {}
    blocks = [("down_blocks.1", 640, 2, 2), ("down_blocks.2", 1280, 2, 10), ("mid_block", 1280, 1, 10)]
    blocks += [("up_blocks.0", 1280, 3, 10), ("up_blocks.1", 640, 3, 2)]
    for block, width, attentions, depth in blocks:
        for i in range(attentions):
            where = f"unet.{block}.attentions.{i}"
            shapes |= {f"{where}.proj_in": (width, width), f"{where}.proj_out": (width, width)}
            for j in range(depth):
                inner = f"{where}.transformer_blocks.{j}"
                for attention in ("attn1", "attn2"):
                    inputs = 2048 if attention == "attn2" else width
                    shapes |= {f"{inner}.{attention}.{name}": (width, width) for name in ("to_q", "to_out.0")}
                    shapes |= {f"{inner}.{attention}.{name}": (width, inputs) for name in ("to_k", "to_v")}
                shapes |= {f"{inner}.ff.net.0.proj": (8 * width, width), f"{inner}.ff.net.2": (width, 4 * width)}
    return shapes


BUILD = Path(__file__).resolve().parent.parent / "build"
"""On the disk, not in memory as /tmp may be, and ignored by git: a run that is killed leaves its files."""
SIZES: dict[str, tuple[Shapes, int, str]] = {
    "texforce": (text_encoder(), 16, "float32"),
    "sdxl": (sdxl(), 32, "float16"),
}

PEFT = """
import json, sys, torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
shapes, rank, out, how, *files = json.loads(sys.argv[1])
class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, (outputs, inputs) in shapes.items():
            parts = name.split(".")
            at = self
            for part in parts[:-1]:
                if part not in at._modules:
                    at.add_module(part, torch.nn.Module())
                at = at._modules[part]
            at.add_module(parts[-1], torch.nn.Linear(inputs, outputs, bias=False, device="meta"))
base = Layers()
for module in base.modules():
    if isinstance(module, torch.nn.Linear):
        module.weight = torch.nn.Parameter(torch.empty(1).expand(module.weight.shape), requires_grad=False)
config = lambda: LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(shapes))
model = get_peft_model(base, config(), adapter_name="a")
model.add_adapter("b", config())
for name, file in zip("ab", files):
    weights = {k.replace(".weight", f".{name}.weight"): v.float() for k, v in load_file(file).items()}
    found = model.base_model.model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys[:2]
extra = {"svd_rank": rank, "svd_full_matrices": False} if how == "svd" else {}
model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "sum", combination_type=how, **extra)
model.save_pretrained(out, selected_adapters=["sum"])
"""
DISK = """
import os, sys
size, out, *files = sys.argv[1:]
for file in files:
    with open(file, "rb") as handle:
        while handle.read(1 << 24): pass
with open(out, "wb") as handle:
    left = int(size)
    block = os.urandom(1 << 24)
    while left > 0:
        left -= handle.write(block[:left])
    handle.flush(); os.fsync(handle.fileno())
"""


def make(folder: Path, size: str) -> list[str]:
    """Two random LoRAs of a size."""
    shapes, rank, dtype = SIZES[size]
    files = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        weights = {}
        for name, (outputs, inputs) in shapes.items():
            weights[f"{name}.lora_A.weight"] = rng.standard_normal((rank, inputs), np.float32).astype(dtype)
            weights[f"{name}.lora_B.weight"] = rng.standard_normal((outputs, rank), np.float32).astype(dtype)
        path = folder / f"{size}{seed}.safetensors"
        path.write_bytes(lora_bytes(weights, {}))
        files.append(str(path))
    return files


def commands(folder: Path, size: str, files: list[str], with_svd: bool) -> dict[str, list[str]]:
    """What is timed, by name."""
    shapes, rank, _ = SIZES[size]
    weighted = [f"{file}:{weight}" for file, weight in zip(files, WEIGHTS)]
    own = [sys.executable, "-m", "texforce_cli", "fuse", *weighted, "--force", "--out"]
    fused = str(folder / "fused.safetensors")
    subprocess.run([*own, fused], check=True, capture_output=True)
    arms = {
        "disk": [sys.executable, "-c", DISK, str(Path(fused).stat().st_size), str(folder / "disk"), *files],
        "texforce cat": [*own, fused],
        "texforce svd": [*own, str(folder / "svd.safetensors"), "--rank", str(rank)],
    }
    for how in ("cat", "svd") if with_svd else ("cat",):
        arguments = json.dumps([shapes, rank, str(folder / f"peft-{how}"), how, *files])
        (folder / f"{size}-{how}.json").write_text(arguments)
        script = f"import sys; sys.argv = ['', open({str(folder / f'{size}-{how}.json')!r}).read()]\n{PEFT}"
        arms[f"peft {how}"] = [sys.executable, "-c", script]
    return arms


# from a small process, because a child's peak begins with that of the process it was forked from
LAUNCH = """
import json, os, subprocess, sys, time
begun = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([time.perf_counter() - begun, usage.ru_maxrss, status]))
"""


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and peak megabytes of a whole process, with as many threads as it chooses."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what pip installs is compiled already
    launched = [sys.executable, "-I", "-S", "-c", LAUNCH, *command]
    done = subprocess.run(launched, capture_output=True, text=True, env=environment)
    seconds, peak, status = json.loads(done.stdout)
    if status:
        raise SystemExit(done.stderr)
    return seconds, peak / (1024 if sys.platform != "darwin" else 1024**2)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument(
        "--sdxl-svd", action="store_true", help="peft's svd at SDXL's size too, in the first round alone: minutes"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"cores": os.cpu_count(), "rounds": options.rounds}
    for size in options.sizes:
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as name:
            folder = Path(name)
            files = make(folder, size)
            arms = commands(folder, size, files, size == "texforce" or options.sdxl_svd)
            found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
            for turn in range(options.rounds):
                for arm, command in arms.items():
                    if turn and (size, arm) == ("sdxl", "peft svd"):
                        continue
                    found[arm].append(timed(command))
                    print(f"{size} {turn} {arm}: {found[arm][-1][0]:.2f} s", file=sys.stderr, flush=True)
        report[size] = {
            arm: {
                "seconds": [round(seconds, 3) for seconds, _ in values],
                "median": round(statistics.median(seconds for seconds, _ in values), 3),
                "peak MB": round(max(memory for _, memory in values)),
            }
            for arm, values in found.items()
        }
        medians = {arm: value["median"] for arm, value in report[size].items()}
        report[size]["ratios"] = {
            "texforce cat / disk": round(medians["texforce cat"] / medians["disk"], 2),
            **{
                f"{arm} / texforce {arm[5:]}": round(medians[arm] / medians[f"texforce {arm[5:]}"], 1)
                for arm in medians
                if arm.startswith("peft")
            },
        }
    print(json.dumps(report, indent=2))
    if options.out:
        write_json(options.out, report)


if __name__ == "__main__":
    main()
