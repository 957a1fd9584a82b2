"""What a pass of training holds on Stable Diffusion 1.5: PyTorch's own count, on tensors without contents.

    python -m benchmarks.memory --out FILE.json

No weights, no arithmetic and no GPU. Counted is the most that is alive at once beside the weights, in blocks of 512 bytes as the
allocator of CUDA cuts them; not what a GPU's kernels take for themselves, nor what an allocator keeps. Attention is fused.
"""

from __future__ import annotations

import argparse
import itertools
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.gpu import pipeline_of, scheduler
from texforce_cli.config import resolve
from texforce_cli.diffusion.adapters import Trained
from texforce_cli.files import write_json
from texforce_cli.quiet import quiet
from texforce_cli.workflows.assembly import make_adapter, make_policy
from texforce_cli.workflows.cost import memory_of
from texforce_cli.workflows.run_folder import versions

_PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it, `now` and at the `most`."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._storages: Any = WeakIdKeyDictionary({tensor.untyped_storage(): None for tensor in known})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, and count what comes of it."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._storages:
            size = -(-storage.nbytes() // 512) * 512
            self._storages[storage] = None
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size


def held(train: str, precision: str, checkpointing: bool, images: int) -> tuple[float, float]:
    """GB of a pass with guidance: counted, and what `texforce train --dry-run` counts on."""
    config = resolve(
        {
            "reward": ["brightness"],
            "preset": "many",
            "device": "cpu",
            "train": train,
            "precision": precision,
            "gradient_checkpointing": checkpointing,
            "micro_batch": images,
        },
        family="sd",
    ).config
    meta = torch.device("meta")
    with meta, quiet():
        pipeline = pipeline_of("sd15", meta, _PRECISIONS[precision])
        adapter = make_adapter(pipeline, config)
    pipeline.scheduler = scheduler()  # its table is read
    parts = [pipeline.unet, pipeline.text_encoder]
    without_contents = FakeTensorMode(allow_non_fake_inputs=True)
    with without_contents:
        for part in parts:
            part.to_empty(device="cpu")
    policy = make_policy(pipeline, config, adapter)
    with without_contents:
        latents = torch.empty(images, *policy.latent_shape)
        weights = (tensor for part in parts for tensor in (*part.parameters(), *part.buffers()))
        with Alive((latents, *weights)) as alive:
            embeddings = policy.embed([f"prompt {i}" for i in range(images)])
            leaf = embeddings.leaf()
            output, _ = policy.output(latents, 0, leaf)
            policy.schedule.log_prob(latents, output, 0).sum().backward()
            embeddings.backward(leaf)
    return alive.most / 1e9, memory_of(config, 512).activations(images)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="JSON file for everything that was counted")
    a = p.parse_args(argv)
    rows = []
    print(f"{'train':14}{'precision':12}{'checkpointing':15}{'images':>8}{'GB':>8}{'--dry-run':>12}")
    for case in itertools.product(get_args(Trained), _PRECISIONS, (False, True), (1, 2)):
        gb, predicted = held(*case)
        train, precision, checkpointing, images = case
        print(
            f"{train:14}{precision:12}{'yes' if checkpointing else 'no':15}{images:8}{gb:8.2f}{predicted:12.2f}",
            flush=True,
        )
        rows.append([*case, round(gb, 3), round(predicted, 3)])
    if a.out:
        write_json(a.out, {"benchmark": "memory", "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
