"""What only a GPU would show, as far as a CPU can: tensors that are not on the run's device, memory that is full, which GPU."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import threading
import tomllib
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import StableDiffusionPipeline
from packaging.requirements import Requirement
from packaging.version import Version
from test_ddpo import make
from test_team import Missing, alone_with
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from texforce_cli import devices, tiny
from texforce_cli.algorithms import ddpo
from texforce_cli.cli.app import run
from texforce_cli.devices import claim, cpu_computes_bf16, full_memory, present, resolve_device, same_bits
from texforce_cli.diffusion.models import Precision, load_pipeline, resolve_model
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.team import Team, processes
from texforce_cli.workflows import assembly, learner, plan, sample
from texforce_cli.workflows.drawing import draw_pictures
from texforce_cli.workflows.evaluation import draw as evaluation_draw
from texforce_cli.workflows.learner import Learner
from texforce_cli.workflows.run_folder import RunFolder

ELSEWHERE = torch.device("lazy:0")
"""A device that this machine does not have either; autograd computes for it in the calling thread, as for the CPU."""


class There(torch.Tensor):
    """Numbers of the CPU that say they are elsewhere."""

    here: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        about = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        made: There = torch.Tensor._make_wrapper_subclass(cls, here.shape, device=ELSEWHERE, **about)  # type: ignore[attr-defined]
        made.here = here
        return made

    def tolist(self) -> Any:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Within this block there is that device, which takes no tensor of another one, as CUDA."""

    def __enter__(self) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is to be seen here too
        return super().__enter__()

    def __exit__(self, *about: Any) -> None:
        super().__exit__(*about)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


_ACROSS = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation done on the CPU; its result is elsewhere where its tensors are, or its `device` says so."""
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    there = [one for one in given if isinstance(one, There)]
    strangers = [one for one in given if not isinstance(one, There) and one.dim()]
    if there and strangers and func.__name__.partition(".")[0] not in _ACROSS:
        raise RuntimeError(f"{func} of tensors on two devices")
    away = bool(there)
    if kwargs.get("device") is not None:
        away = torch.device(kwargs["device"]).type == ELSEWHERE.type
        kwargs = {**kwargs, "device": "cpu" if away else kwargs["device"]}
    elif not there:
        return func(*args, **kwargs)
    known = {id(one.here): one for one in there}
    args, kwargs = tree_map(lambda one: one.here if isinstance(one, There) else one, (args, kwargs))

    def marked(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        return known.get(id(one)) if id(one) in known else There(one) if away else one

    return tree_map(marked, func(*args, **kwargs))


def test_a_run_mixes_no_devices() -> None:
    options = {
        "model": "tiny",
        "device": "cpu",
        "steps": 2,
        "guidance": 3.0,
        "train_steps": "all",
        "kl": 0.1,
        "ema": 0.5,
    }
    sizes = {"samples_per_epoch": 2, "group_size": 2, "micro_batch": 2, "grad_accum": 1, "epochs": 2, "eval_images": 2}
    more = {"reward": ["brightness"], "uncond_embedding": "snapshot", "timestep_batch": 2}
    made = plan.plan({**options, **sizes, **more})
    config = replace(made.config, device=str(ELSEWHERE))
    with Elsewhere(), contextlib.closing(assembly.make_scoring(config, made.registry)) as scoring:
        ours = Learner(config, made.prompts, scoring, team=Team(), progress=lambda *about, **more: None, begin=True)
        assert ours.policy.device == ELSEWHERE
        assert ours.preflight().ratio_ok
        ours.measure_base()
        assert ours.epoch(0).grad_norm > 0
        ours.restore(ours.tensors(), ours.numbers())
        assert ours.epoch(1).grad_norm > 0
        assert ours.measure(2, 4).images == 4
        draw_pictures(ours.policy, "euler", [("a cat", 0)])


def test_what_is_made_on_the_cpu_by_mistake_is_seen() -> None:
    with Elsewhere():
        there = torch.ones(2, device=ELSEWHERE)
        assert (there * torch.tensor(2.0)).tolist() == [2.0, 2.0]
        with pytest.raises(RuntimeError, match="on two devices"):
            there * torch.ones(2)


# which GPU


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two GPUs, the first of which is the current one; the last entry is the one that the process has claimed."""
    claimed = ["cuda:0"]
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, device=None: ones(size))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: claimed.append(str(name)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device(claimed[-1]).index)
    return claimed


def test_a_gpu_that_was_claimed_has_its_number_in_every_thread(gpus: list[str]) -> None:
    for name in ("cuda", "cpu", "mps"):
        claim(name)
    assert (gpus, resolve_device("auto")) == (["cuda:0"], torch.device("cuda"))
    claim("cuda:1")
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:1")
    assert resolve_device("cuda:0") == torch.device("cuda:0")


def test_an_evaluation_claims_the_gpu_that_it_draws_on(gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert evaluation_draw._device("cuda", (1, 3)) == torch.device("cuda:1")
    assert gpus[-1] == "cuda:1" and resolve_device("auto") == torch.device("cuda:1")
    assert evaluation_draw._device("cuda:0", (0, 1)) == torch.device("cuda:0") and gpus[-1] == "cuda:0"


def test_the_gpu_of_a_run_is_claimed_before_its_rewards_choose_one(
    gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "device_memory_gb", lambda device: 24.0)
    made = plan.plan({"reward": ["brightness"], "model": "tiny", "device": "cuda:1"})
    assert (made.config.device, gpus) == ("cuda:1", ["cuda:0", "cuda:1"])

    class Follower(Team):
        rank, size = 1, 2

        def of_leader(self, value: Any = None) -> Any:
            return RunFolder(Path("a")), {"device": "cuda"}, made.prompts, {}, {}

        def device(self, name: str) -> str:
            return "cuda:3"

        def leave(self, error: BaseException) -> None:
            assert str(error) == "scoring"

    def scoring(*about: Any) -> None:
        assert gpus[-1] == "cuda:3"
        raise TexforceError("scoring", "")

    monkeypatch.setattr(learner, "_scoring_beside", scoring)
    with pytest.raises(TexforceError, match="scoring"):
        learner.follow(Follower())  # type: ignore[arg-type]


def test_rewards_of_this_process_score_on_the_gpu_that_was_claimed(
    gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim("cuda:1")
    set_in = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda name: set_in.append((str(name), threading.current_thread().name))
    )
    made = plan.plan({"reward": ["brightness"], "model": "tiny", "device": "cpu"})
    config = replace(made.config, device="cuda:1")
    with contextlib.closing(assembly.make_rewards(config, made.registry)) as rewards:
        scores = rewards.submit(np.zeros((1, 8, 8, 3), np.uint8), ["a cat"], [{}])
        assert scores.result()["brightness"].tolist() == [0.0]
    assert ("cuda:1", "texforce-rewards_0") in set_in


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_that_torch_has_no_kernels_for_is_told_before_a_model_is_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(size: int, device: torch.device) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nSearch for ...")

    monkeypatch.setattr(torch, "ones", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match=r"'cuda' is not available here \(CUDA error: no kernel image .*\); use cpu$"):
        resolve_device(name)


def test_a_gpu_decides_nothing_where_another_device_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("texforce_cli.diffusion.models.device_memory_gb", lambda device: 24.0)
    names = {device: resolve_model("auto", device).name for device in ("auto", "cuda", "cuda:1", "cpu", "mps")}
    assert names == {"auto": "sd15", "cuda": "sd15", "cuda:1": "sd15", "cpu": "tiny", "mps": "tiny"}
    made = plan.plan({"reward": ["brightness"], "device": "cpu"})
    assert (made.source.name, made.source.reason) == ("tiny", "on cpu the default is the embedded model")


def test_a_gpu_that_is_busy_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(index: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    assert present()[0] == "cuda:0 (GPU, CUDA error: CUDA-capable device(s) is/are busy or unavailable)"


def test_time_is_measured_on_the_gpu_that_computes(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    algorithm = make(pipeline)
    algorithm.policy.device = torch.device("cuda:1")
    algorithm._seconds = {"sampling": 0.0}
    with algorithm._timed("sampling"):
        pass
    assert waited == [torch.device("cuda:1")]


@pytest.mark.parametrize(("device", "ahead"), [("cuda", True), ("cuda:1", True), ("mps", False), ("cpu", False)])
def test_rewards_score_in_a_thread_of_their_own_beside_cuda_alone(
    device: str, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(assembly, "RewardSet", lambda terms, registry, **settings: given.update(settings))
    made = plan.plan({"reward": ["brightness"], "model": "tiny", "device": "cpu"})
    assembly.make_rewards(replace(made.config, device=device), made.registry)
    assert given["ahead"] is ahead


@pytest.mark.parametrize(("nccl", "backend", "summed_on"), [(True, "nccl", "cuda"), (False, "gloo", "cpu")])
def test_a_sum_of_gpus_that_fails_is_an_error_of_this_process(
    gpus: list[str], monkeypatch: pytest.MonkeyPatch, nccl: bool, backend: str, summed_on: str
) -> None:
    zeros, begun, devices = torch.zeros, [], []
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "")  # what is set from here on is forgotten after the test
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT")
    monkeypatch.setattr(torch, "zeros", lambda size, device=None: devices.append(device) or zeros(size))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **about: begun.append((backend, dict(os.environ))))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    with contextlib.closing(alone_with(Missing())) as ours:
        monkeypatch.setattr(processes, "_uuid", lambda device: f"the GPU {device}")
        monkeypatch.setattr(ours, "each", lambda value: [value] * 2)
        with pytest.raises(UsageError, match="2 processes share 1 GPUs; give fewer processes"):
            ours.compute("cuda", 60.0)
        monkeypatch.setattr(ours, "each", lambda value: [value, "another"])
        ours.compute("cuda", 60.0)
        monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: devices.append("moved to the cpu") or tensor)
        ours.total([torch.ones(1)])
    [(taken, environment)] = begun
    assert (taken, environment["TORCH_NCCL_BLOCKING_WAIT"]) == (backend, "1")
    assert devices == [summed_on, *([] if nccl else ["moved to the cpu"])]


def test_what_is_known_of_attention_is_not_told_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # what is set from here on is forgotten after the test
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            same_bits()
            assert torch.are_deterministic_algorithms_enabled()
        finally:
            torch.use_deterministic_algorithms(False)
        for kind in ("Flash", "Memory Efficient"):
            warnings.warn(f"{kind} Attention defaults to a non-deterministic algorithm. To explicitly", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(one.message) for one in said] == ["another"]


def test_a_machine_that_cannot_compile_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def refuse(ours: Learner) -> None:
        raise TorchDynamoException("Cannot find a working triton installation.\n\nMore information ...")

    monkeypatch.setattr(Learner, "preflight", refuse)
    monkeypatch.chdir(tmp_path)
    options = ["--reward", "brightness", "--model", "tiny", "--device", "cpu", "--eval-images", "0", "--compile"]
    assert run(["train", *options]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "torch.compile does not work here (Cannot find a working triton installation.); go on with: texforce train --resume "
        "runs/brightness-tiny-1 --no-compile" in said
    )


# memory that is full


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("MPS backend out of memory (MPS allocated: 8.00 GB)", True),
        ("GET was unable to find an engine to execute this computation", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_full_memory_has_many_names(text: str, full: bool) -> None:
    with pytest.raises(RuntimeError) as caught, full_memory():
        raise RuntimeError(text)
    assert isinstance(caught.value, torch.OutOfMemoryError) is full
    assert text in str(caught.value)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_what_a_failed_pass_has_filled_is_free_when_it_is_tried_again(
    pipeline: Any, kind: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm, held = make(pipeline), []

    def fill() -> None:
        activations = torch.zeros(3)
        held.append(weakref.ref(activations))
        raise kind("MPS backend out of memory")

    monkeypatch.setattr(devices, "release", lambda: held.append(held[0]()))
    assert algorithm._tried(fill, 4) is None
    assert held[1:] == [None] and algorithm.micro_batch == 2


def test_memory_is_given_back_before_rewards_score(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (done.append(name), work(*given))[1]

    monkeypatch.setattr(ddpo, "release", lambda: done.append("release"))
    algorithm = make(pipeline, micro_batch=12)
    monkeypatch.setattr(algorithm, "_score", noted("score", algorithm._score))
    monkeypatch.setattr(algorithm, "_loss", noted("learn", algorithm._loss))
    algorithm.preflight()
    algorithm.run_epoch(0)
    assert done == ["release", "score", *["learn"] * 3, "release"]


@pytest.mark.parametrize(
    ("device", "name", "sliced", "last"),
    [("cuda", "sd", True, True), ("mps", "sd", True, False), ("cpu", "sd", False, True), ("cuda", "tiny", False, True)],
)
def test_how_a_model_lies_on_a_device(
    device: str, name: str, sliced: bool, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusionPipeline, "to", lambda self, device: self)
    source = resolve_model(str(tiny.WEIGHTS) if name == "sd" else name)
    made = load_pipeline(source, device=torch.device(device), precision="fp32")
    assert made.vae.use_slicing is sliced
    assert made.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last) is last


@pytest.mark.parametrize(("precision", "plain"), [("bf16", True), ("fp32", False)])
def test_the_embedded_model_in_bf16_on_a_cpu_lies_as_it_is_quickest(precision: Precision, plain: bool) -> None:
    made = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision=precision)
    assert {type(one).__name__ for one in made.unet.attn_processors.values()} == (
        {"AttnProcessor"} if plain else {"AttnProcessor2_0"}
    )
    last = torch.channels_last
    assert made.unet.conv_in.weight.is_contiguous(memory_format=last) is not plain
    assert made.vae.decoder.layers[0].weight.is_contiguous(memory_format=last)


@pytest.mark.parametrize(
    ("known", "expected"), [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True}, False)]
)
def test_which_processors_multiply_in_bf16(
    known: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert cpu_computes_bf16() is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch says nothing
    assert cpu_computes_bf16() is False


def test_a_model_that_the_device_has_no_room_for_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, device: torch.device) -> None:
        raise RuntimeError("MPS backend out of memory")

    monkeypatch.setattr(StableDiffusionPipeline, "to", full)
    for precision, remedy in (("fp32", "is using it, or give --precision bf16 or fp16"), ("bf16", "is using it")):
        with pytest.raises(TexforceError, match=f"memory of cpu has no room for 'tiny'; end what else {remedy}$"):
            load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision=precision)  # type: ignore[arg-type]


@pytest.mark.parametrize(("room", "code"), [(2, 0), (0, 1)])
def test_pictures_are_drawn_as_many_at_once_as_there_is_room_for(
    room: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, sizes = sample.draw_pictures, []

    def small(policy: Any, scheduler: str, pairs: Any) -> Any:
        sizes.append(len(pairs))
        if len(pairs) > room:
            raise torch.OutOfMemoryError("full")
        return real(policy, scheduler, pairs)

    monkeypatch.setattr(sample, "draw_pictures", small)
    monkeypatch.chdir(tmp_path)
    drawn = run(["sample", "a cat", "--model", "tiny", "--steps", "2", "--seeds", "0:6", "--batch", "4", "--out", "p"])
    assert drawn == code
    said = " ".join(capsys.readouterr().err.split())
    assert "the memory of cpu was too full for 4 images at once: it goes on with 2" in said
    if code:
        assert "the memory of cpu is too full for one picture; use --precision bf16 or a smaller --size" in said
    else:
        assert sizes == [4, 2, 2, 2] and len(list(Path("p").glob("*.png"))) == 6


def test_a_preflight_holds_the_memory_of_one_pass_at_a_time_beside_that_of_an_epoch(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = make(pipeline, guidance=3.0, unconditional="snapshot", steps="all")
    room_of_an_epoch, log_prob = algorithm._room_of_an_epoch, algorithm._log_prob
    rooms: list[list[weakref.ref[torch.Tensor]]] = []
    passes: list[weakref.ref[torch.Tensor]] = []

    def latents(states: int, images: int) -> torch.Tensor:
        made = real(states, images)
        held.append(weakref.ref(made))
        return made

    def room() -> list[torch.Tensor]:
        held.clear()
        made = room_of_an_epoch()
        assert len(held) == 4  # twice at once
        rooms.append([weakref.ref(one) for one in made])
        return made

    def one(*about: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert all(one() is not None for one in rooms[0]) and all(earlier() is None for earlier in passes)
        found = log_prob(*about)
        passes.append(weakref.ref(found[0]))
        return found

    held: list[weakref.ref[torch.Tensor]] = []
    real = algorithm._latents
    monkeypatch.setattr(algorithm, "_latents", latents)
    monkeypatch.setattr(algorithm, "_room_of_an_epoch", room)
    monkeypatch.setattr(algorithm, "_log_prob", one)
    assert algorithm.preflight().ok and len(passes) == 2 * 6
    assert all(one() is None for one in rooms[0])
    algorithm._seconds = dict.fromkeys(("sampling", "rewards", "training"), 0.0)
    drawn = algorithm._collect(0).trajectory
    assert drawn.unconditional is not None
    assert [one.shape for one in room_of_an_epoch()] == [drawn.latents.shape, drawn.unconditional.shape]


def test_torch_is_required_as_new_as_the_libraries_want_it() -> None:
    """Ourselves we use torch.compiler.set_stance of 2.6; the uuid of a GPU and torch.OutOfMemoryError came with 2.5."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    theirs = [text for name in ("diffusers", "transformers") for text in importlib.metadata.requires(name) or ()]
    ours, wanted = (
        max(Version(s.version) for r in map(Requirement, texts) if r.name == "torch" for s in r.specifier)
        for texts in (project["dependencies"], theirs)
    )
    assert ours >= wanted


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does")
def test_memory_that_was_freed_is_kept() -> None:
    code = """
import psutil
from texforce_cli.devices import keep_memory
rss, size = psutil.Process().memory_info, 10_000_000
{}
blocks = [bytearray(b"1") * size for _ in range(20)]
held = rss().rss
del blocks
print(held - rss().rss > 10 * size)
"""
    for call, given_back in (("", "True"), ("keep_memory()", "False")):
        said = subprocess.run([sys.executable, "-c", code.format(call)], capture_output=True, text=True, check=True)
        assert said.stdout.strip() == given_back
