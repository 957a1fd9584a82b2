"""Several processes: the same result as one, and an end with a name where one of them fails."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_ddpo import PROMPTS, make

from texforce_cli import __version__
from texforce_cli.algorithms.ddpo import Rollouts
from texforce_cli.algorithms.optimisation import Optimisation, OptimiserSettings
from texforce_cli.cli.app import run
from texforce_cli.diffusion.models import fingerprint, load_pipeline, resolve_model
from texforce_cli.diffusion.sampler import rollout
from texforce_cli.errors import Interrupted, TexforceError, UsageError
from texforce_cli.lora.read import FILE_NAME
from texforce_cli.rewards import terms
from texforce_cli.team import Team, launched
from texforce_cli.team.processes import Processes
from texforce_cli.team.start import _refuse_device, joined, team
from texforce_cli.team.store import Folder
from texforce_cli.workflows.assembly import make_scoring
from texforce_cli.workflows.learner import Learner, follow
from texforce_cli.workflows.plan import plan
from texforce_cli.workflows.run_folder import RunFolder
from texforce_cli.workflows.stopping import StopRequest
from texforce_cli.workflows.training_run import TrainingRun

IMAGES = 12


class Recorder:
    """In the place of Adam: keeps the gradients that it is given."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters, self.param_groups, self.seen = parameters, [], torch.empty(0)

    def step(self) -> None:
        self.seen = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])

    def zero_grad(self) -> None:
        pass


def gradient(of: Team, dtype: torch.dtype) -> torch.Tensor:
    """What the optimiser is given for one update of 12 images, micro-batches of 4, moved LoRA weights."""
    pipeline = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32").to(dtype)
    algorithm = make(pipeline, guidance=3.0, clip_range=1e-5, samples=IMAGES, update_batch=IMAGES)
    generator = torch.Generator().manual_seed(5)
    assert algorithm.policy.adapter is not None
    for parameter in algorithm.policy.adapter.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    texts = [p.text for p in PROMPTS for _ in range(4)]
    drawn = rollout(algorithm.policy, texts, range(IMAGES), latent_dtype=dtype)
    for parameter in algorithm.policy.adapter.parameters():  # so that the ratio is not 1 and some are clipped
        parameter.data += 1e-3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    parameters = algorithm.policy.adapter.parameters()
    algorithm.team = of
    algorithm.optimisation = Optimisation(parameters, OptimiserSettings(1e-2, 1, max_grad_norm=1e9), of)
    recorder = Recorder(parameters)
    algorithm.optimisation._adam = recorder  # type: ignore[assignment]
    share = algorithm._share(0)
    places = torch.full((IMAGES,), -1)
    places[torch.tensor(share)] = torch.tensor(share)  # every process has drawn all images here
    scores = algorithm.rewards.total(algorithm.rewards.score(drawn.images, texts, [{}] * IMAGES))
    rollouts = Rollouts(drawn, places, tuple(texts), scores, {}, ())
    steps = torch.tensor(algorithm.policy.schedule.stochastic[:3])[:, None].expand(-1, IMAGES)
    advantages = torch.linspace(-1, 1, IMAGES, dtype=dtype)
    algorithm._update(rollouts, algorithm._order(0, 0), steps, advantages)
    return recorder.seen


def follow_gradient(place: Processes) -> None:
    place.compute("cpu", 60)
    for dtype in (torch.float64, torch.float32):
        gradient(place, dtype)
    place.total = unsummed  # type: ignore[method-assign]
    gradient(place, torch.float32)


def unsummed(tensors: Sequence[torch.Tensor]) -> None:
    """What makes every process learn for itself."""


@pytest.fixture(scope="module")
def alone() -> dict[torch.dtype, torch.Tensor]:
    return {dtype: gradient(Team(), dtype) for dtype in (torch.float64, torch.float32)}


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_summed_gradient_is_that_of_one_process_and_without_the_sum_another_one(
    count: int, alone: dict[torch.dtype, torch.Tensor]
) -> None:
    with team(count, "cpu", follow_gradient) as ours:
        assert isinstance(ours, Processes)
        ours.compute("cpu", 60)
        found = {dtype: gradient(ours, dtype) for dtype in alone}
        ours.total = unsummed  # type: ignore[method-assign]
        broken = gradient(ours, torch.float32)
    for dtype, most in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        assert alone[dtype].norm() > 0
        assert ((found[dtype] - alone[dtype]).norm() / alone[dtype].norm()).item() <= most
    assert ((broken - alone[torch.float32]).norm() / alone[torch.float32].norm()).item() > 0.1


def die(place: Processes) -> None:
    os._exit(1)


def hang(place: Processes) -> None:
    place._patience = 600
    time.sleep(600)


def freeze(place: Processes) -> None:
    while not place._store.check(["pulse/1"]):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(place: Processes) -> None:
    place.leave(TexforceError("the reward 'x' failed", "mend it"))


def stop(place: Processes) -> None:
    place.leave(Interrupted("stopped", exit_code=143))


def die_in_a_sum(place: Processes) -> None:
    place.compute("cpu", 60)
    place.each(None)
    place.each(None)  # the others count on this process from here on
    os._exit(1)


@pytest.mark.slow
def test_a_process_that_dies_within_a_sum_is_named_where_only_its_launcher_sees_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("texforce_cli.team.processes.PULSE", 0.2)
    with team(2, "cpu", die_in_a_sum) as ours:
        assert isinstance(ours, Processes)
        ours.compute("cpu", 60)
        ours._ended = list
        with pytest.raises(TexforceError, match=r"process 1 of 2 ended or hangs \("):
            ours.total([torch.zeros(3)])


def test_of_those_left_in_a_broken_sum_the_silent_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("texforce_cli.team.processes.PULSE", 0.1)
    store = Missing()
    ours, other = (Processes(store, lambda: None, rank, 4) for rank in (0, 2))
    with contextlib.closing(ours), contextlib.closing(other):
        store.kept["pulse/1"] = pickle.dumps("17")  # and process 3 never showed any
        assert ours._silent() == [1, 3]
        other.leave(TexforceError("process 3 of 4 ended or hangs"))  # it knows better
        with pytest.raises(TexforceError, match="process 2: process 3 of 4 ended or hangs"):
            raise ours._broken(RuntimeError("connection closed by peer"))


def test_a_full_disk_where_the_processes_meet_is_no_process_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with contextlib.closing(Processes(Folder(tmp_path), lambda: None, 0, 2)) as ours:
        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(TexforceError, match=r"No space left on device.*TMPDIR"):
            ours.each(None)
        ours.leave(TexforceError("the others cannot be told"))
    with pytest.raises(RuntimeError, match="cannot be written"):  # the leader took the folder with it
        Folder(tmp_path / "gone").set("1/0", b"")


@pytest.mark.parametrize(
    ("follower", "patience", "kind", "says"),
    [
        pytest.param(
            die, 60, TexforceError, r"process 1 of 2 ended or hangs; see its messages", marks=pytest.mark.slow
        ),
        (hang, 3, TexforceError, r"process 1 of 2 ended or hangs \(did not answer within 3 s\)"),
        pytest.param(
            freeze,
            60,
            TexforceError,
            r"process 1 of 2 ended or hangs \(no sign of life for 4 s\)",
            marks=pytest.mark.slow,
        ),
        (fail, 60, TexforceError, r"process 1: the reward 'x' failed; mend it"),
        pytest.param(stop, 60, Interrupted, r"stopped", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_goes_wrong_is_named_in_time(
    follower: Callable[[Processes], None],
    patience: float,
    kind: type[TexforceError],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("texforce_cli.team.processes._PULSELESS", 4.0)
    before = dict(os.environ)
    with pytest.raises(kind, match=says), team(2, "cpu", follower) as ours:
        assert isinstance(ours, Processes)
        while not ours._store.check(["pulse/1"]) and multiprocessing.active_children():
            time.sleep(0.1)
        ours._patience, begun = patience, time.monotonic()
        try:
            ours.each(None)
        finally:
            assert time.monotonic() - begun < 15
    assert not multiprocessing.active_children()
    assert dict(os.environ) == before


def count(place: Processes) -> None:
    for turn in range(50):
        place.each(turn)
    assert place.of_leader() == "word"


def test_words_are_heard_in_their_turn_and_forgotten() -> None:
    with team(3, "cpu", count) as ours:
        assert isinstance(ours, Processes)
        for turn in range(50):
            assert ours.each(turn) == [turn] * 3
        assert isinstance(ours._store, Folder)
        assert len(list(ours._store.path.iterdir())) < 12
        ours.of_leader("word")


def test_a_launchers_store_carries_values_that_are_larger_than_its_server_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights and moments of a resumed run, or held-out pictures, through the store that torchrun makes."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=True)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**where, "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    ours = joined()
    monkeypatch.setenv("RANK", "1")
    value = os.urandom(9 * 2**20)
    with contextlib.closing(ours), contextlib.closing(joined()) as other, ThreadPoolExecutor(1) as beside:
        for said in (value, b"", b""):
            heard = beside.submit(other.of_leader)
            assert ours.each(said) == [said, None] and heard.result() == said
        assert server.num_keys() < 10  # what all have heard is forgotten


def test_a_signal_is_heard_while_waiting(tmp_path: Path) -> None:
    asked = StopRequest(grace=1.0)
    with pytest.raises(Interrupted), asked.listening(), team(2, "cpu", hang) as ours:
        ours.shield = asked.shielded
        begun = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            ours.each(None)
        finally:
            assert time.monotonic() - begun < 3


class Missing:
    """A store that is there, where the others never say anything, and that can be broken."""

    def __init__(self, failures: int = 0) -> None:
        self.kept: dict[str, bytes] = {}
        self.failures = failures

    def set(self, key: str, value: bytes) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("Broken pipe")
        self.kept[key] = value

    def get(self, key: str) -> bytes:
        return self.kept[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.kept[key] for key in keys]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.kept for key in keys)

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        if not self.check(keys):
            time.sleep(0.05)
            raise RuntimeError("not yet")

    def delete_key(self, key: str) -> bool:
        raise RuntimeError("Broken pipe")


def test_a_turn_is_four_words_with_the_store_however_many_the_processes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    store, words = Missing(), list[str]()
    store.kept |= {f"{turn}/{rank}": pickle.dumps(rank) for turn in (1, 2) for rank in range(1, 64)}
    with contextlib.closing(Processes(store, lambda: None, 0, 64)) as ours:
        ours.each(None)
        for name in ("set", "get", "multi_get", "wait", "delete_key"):
            monkeypatch.setattr(store, name, counted(getattr(store, name), words))
        assert ours.each(0) == [*range(64)]
        assert [word for word in words if "pulse" not in word] == [
            "set 2/0",
            "wait 2/1",
            "multi_get 2/1",
            "delete_key 1/0",
        ]


def counted(word: Callable[..., Any], words: list[str]) -> Callable[..., Any]:
    """The same, noted with the first key that it is about."""

    def noted(key: Any, *more: Any) -> Any:
        words.append(f"{word.__name__} {key if isinstance(key, str) else key[0]}")
        return word(key, *more)

    return noted


def alone_with(store: Missing, rank: int = 0) -> Processes:
    return Processes(store, lambda: None, rank, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_is_heard_while_another_process_hangs(number: signal.Signals) -> None:
    asked, begun = StopRequest(), time.monotonic()
    with contextlib.closing(alone_with(Missing())) as ours:
        ours.heed, ours._patience = asked.heed, 20.0
        with pytest.raises(Interrupted), asked.listening():
            os.kill(os.getpid(), number)
            ours.each(None)
        assert time.monotonic() - begun < 5
        asked.heed()  # what comes after is not to be stopped
        with asked.listening(), pytest.raises(Interrupted):
            os.kill(os.getpid(), number)
            with asked.shielded():
                asked.heed()  # others count on this process
            asked.heed()


def test_a_process_shows_its_life_again_after_a_write_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("texforce_cli.team.processes.PULSE", 0.01)
    store, deadline = Missing(failures=1), time.monotonic() + 10
    with contextlib.closing(alone_with(store)):
        while not store.check(["pulse/0"]):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_store_that_is_gone_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(alone_with(Missing(failures=10**9), rank=1)) as ours:
        with pytest.raises(TexforceError, match=r"process 0 of 2 ended or hangs \(Broken pipe\); see its messages"):
            ours.each(None)
        ours.part()
    store = Missing()
    with contextlib.closing(alone_with(store)) as ours:
        store.kept |= {f"{turn}/1": pickle.dumps("word") for turn in (1, 2)}
        assert [ours.each("mine"), ours.each("mine")] == [["mine", "word"]] * 2  # what cannot be forgotten stays


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with contextlib.closing(alone_with(Missing(), rank=1)) as ours:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert [ours.device(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a scheduler shows it its own alone
        assert [ours.device(name) for name in ("cuda", "cpu")] == ["cuda:0", "cpu"]
    assert Team().device("cuda:0") == "cuda:0"


def test_the_patience_begins_when_all_have_loaded_the_model() -> None:
    store = Missing()
    with contextlib.closing(alone_with(store)) as ours:
        ours._patience = 3.0
        late = threading.Timer(0.5, lambda: store.set("1/1", pickle.dumps(None)))
        late.start()
        ours.be_patient(0.1)  # the other one is later than that
        with pytest.raises(TexforceError, match=r"did not answer within 0.1 s"):
            ours.each(None)
        late.join()


def test_who_left_or_ended_is_heard_of_between_exchanges() -> None:
    store, ended = Missing(), list[int]()
    ours = Processes(store, lambda: None, 0, 3, lambda: ended)
    with contextlib.closing(ours):
        ours.look()
        ended.append(2)
        with pytest.raises(TexforceError, match="process 2 of 3 ended or hangs; see its messages"):
            ours.look()
        store.kept["left/1"] = pickle.dumps(("the reward 'x' failed", "mend it", 0))  # its word says more
        with pytest.raises(TexforceError, match="process 1: the reward 'x' failed; mend it"):
            ours.look()
        assert ours.told and ours.knows(0)


def test_that_the_leader_has_left_is_heard_within_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("texforce_cli.team.processes.PULSE", 0.01)
    store, deadline = Missing(), time.monotonic() + 10
    with contextlib.closing(alone_with(store, rank=1)) as ours:
        ours.get_on()
        store.kept["left/0"] = pickle.dumps(("stopped", None, 143))
        with pytest.raises(Interrupted, match="stopped"):
            while time.monotonic() < deadline:
                ours.get_on()
                time.sleep(0.01)


@pytest.mark.parametrize(("asleep", "shown"), [(60.0, {"pulse/1": pickle.dumps("17")}), (3600.0, {})])
def test_a_process_that_was_stopped_itself_blames_nobody(
    asleep: float, shown: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-Z stops all of a job: the one that wakes up first finds the last signs of life of the others old."""
    store, real, looks = Missing(), time.monotonic, list[int]()
    monkeypatch.setattr(time, "monotonic", lambda: real() + asleep * (len(looks) > 1))
    store.kept |= shown

    def heed() -> None:
        looks.append(1)
        if len(looks) == 9:
            store.set("1/1", pickle.dumps("word"))

    with contextlib.closing(alone_with(store)) as ours:
        ours.heed, ours._patience = heed, 600.0
        assert ours.each("mine") == ["mine", "word"]


@pytest.mark.parametrize("gets_on", [True, False])
def test_a_slow_process_that_gets_on_is_waited_for(gets_on: bool) -> None:
    store, looks = Missing(), list[int]()

    def heed() -> None:
        looks.append(1)
        store.set("pulse/1", pickle.dumps(f"{len(looks)} {len(looks) * gets_on}"))
        if len(looks) == 20:
            store.set("1/1", pickle.dumps("word"))

    with contextlib.closing(alone_with(store)) as ours:
        ours.heed, ours._patience = heed, 0.4
        if gets_on:
            assert ours.each("mine") == ["mine", "word"]
        else:
            with pytest.raises(TexforceError, match=r"process 1 of 2 ended or hangs \(did not answer within 0.4 s\)"):
                ours.each("mine")


def test_a_process_gets_on_with_each_denoising_step_of_a_batch_that_takes_long() -> None:
    made, store = plan({"reward": ["brightness"], "model": "tiny", "device": "cpu"}), Missing()
    store.kept["1/1"] = pickle.dumps(None)  # the other one has loaded the model too
    with (
        contextlib.closing(alone_with(store)) as ours,
        contextlib.closing(make_scoring(made.config, made.registry)) as scoring,
    ):
        learner = Learner(made.config, made.prompts, scoring, team=ours, progress=lambda *a, **b: None, begin=True)
        before = ours._steps
        rollout(learner.policy, ["a cat"], [0])
        assert ours._steps == before + made.config.steps


@pytest.mark.parametrize("waits", ["rewards", "evaluation"])
def test_who_waits_for_a_reward_gets_on_and_hears_a_signal(waits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"samples_per_epoch": 4, "group_size": 4, "micro_batch": 4, "grad_accum": 1, "steps": 2, "eval_images": 4}
    made = plan({"reward": ["brightness"], "model": "tiny", "device": "cpu", **small})

    def submit(*batch: Any) -> Future[Any]:
        slow: Future[Any] = Future()
        timer = threading.Timer(5, slow.set_exception, [TexforceError("nothing was heard all the while")])
        timer.daemon = True
        timer.start()
        return slow

    def progress(phase: str, done: int, total: int, *, reward: float | None = None) -> None:
        if phase == waits:
            raise Interrupted(f"{done} of {total}", exit_code=143)

    monkeypatch.setattr(terms, "_SLICE", 0.01)
    with contextlib.closing(make_scoring(made.config, made.registry)) as scoring:
        learner = Learner(made.config, made.prompts, scoring, team=Team(), progress=progress, begin=True)
        monkeypatch.setattr(scoring.rewards, "submit", submit)
        with pytest.raises(Interrupted, match=r"^0 of"):
            learner.epoch(0) if waits == "rewards" else learner.measure_base()


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_wait_that_may_have_no_end_is_no_getting_on(elsewhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "_SLICE", 0.001)
    monkeypatch.setattr(terms._Term, "elsewhere", elsewhere)
    made, scores = plan({"reward": ["brightness"], "model": "tiny", "device": "cpu"}), Future[Any]()
    looks, steps = list[int](), list[int]()

    def meanwhile() -> None:
        looks.append(len(steps))
        if len(looks) == 3:
            scores.set_result({})

    with contextlib.closing(make_scoring(made.config, made.registry)) as scoring:
        assert scoring.rewards.awaited(scores, meanwhile, lambda: steps.append(1)) == {}
    assert (looks, len(steps)) == (([0, 1, 2], 4) if elsewhere else ([0, 0, 0], 1))


def test_a_full_memory_in_a_process_that_follows_is_a_sentence_there_and_for_the_leader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*about: Any) -> None:
        raise torch.OutOfMemoryError("full")

    made, store = plan({"reward": ["brightness"], "model": "tiny", "device": "cpu"}), Missing()
    store.kept["1/0"] = pickle.dumps((RunFolder(Path("run")), asdict(made.config), made.prompts, {}, {}))
    monkeypatch.setattr("texforce_cli.workflows.learner._scoring_beside", full)
    with contextlib.closing(alone_with(store, rank=1)) as ours, contextlib.closing(alone_with(store)) as leader:
        with pytest.raises(TexforceError, match="the memory of cpu is full"):
            follow(ours)
        with pytest.raises(TexforceError, match=r"process 1: the memory of cpu is full.*--gradient-checkpointing or"):
            leader.look()


def test_a_machine_whose_rewards_are_of_another_version_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    made, store = plan({"reward": ["brightness"], "model": "tiny", "device": "cpu"}), Missing()
    about = (RunFolder(Path("run")), asdict(made.config), made.prompts, fingerprint(made.source), {"texforce": "0.0"})
    store.kept["1/0"] = pickle.dumps(about)
    scoring = make_scoring(made.config, made.registry)
    monkeypatch.setattr("texforce_cli.workflows.learner._scoring_beside", lambda *about: scoring)
    monkeypatch.setattr(Processes, "compute", None)  # what comes next
    said = rf"come from texforce {__version__} here and from texforce 0.0 at the"
    with contextlib.closing(alone_with(store, rank=1)) as ours, pytest.raises(TexforceError, match=said):
        follow(ours)


MEETS = """
from texforce_cli.team import start

start._STORE_ANSWERS = 4.0
place = start.joined()
print("met", flush=True)
place.each(None)
"""


@pytest.mark.slow
def test_a_process_whose_store_is_on_a_frozen_machine_ends_with_a_sentence() -> None:
    """As torchrun's own process holds it, which never answers again."""
    holds = (
        "from torch.distributed import TCPStore as S; s = S('127.0.0.1', 0, is_master=True, wait_for_workers=False); "
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", holds + "print(s.port, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    where = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": holder.stdout.readline().strip(),
        "RANK": "1",
        "WORLD_SIZE": "2",
    }
    environment = {**os.environ, **where, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ours = subprocess.Popen(
        [sys.executable, "-c", MEETS], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert ours.stdout is not None and ours.stdout.readline() == "met\n"
        holder.send_signal(signal.SIGSTOP)
        _, said = ours.communicate(timeout=40)
    finally:
        for process in (holder, ours):
            process.kill()
            process.communicate()
    assert ours.returncode == 1
    assert "error: another process ended or hangs (the machine where they meet has not answered for 4 s)" in said


HANGS = """
import time
from texforce_cli.team import start

def follow(place):
    start._LEADER_HEARS = 0.5
    place._patience = 1.0
    try:
        place.each(None)
    except BaseException as error:
        place.leave(error)
        raise

if __name__ == "__main__":
    with start.team(2, "cpu", follow):
        time.sleep(600)
"""


def test_a_leader_that_hangs_is_named_and_ended_by_the_others(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    job = subprocess.Popen([sys.executable, tmp_path / "hangs.py"], stderr=subprocess.PIPE, text=True)
    try:
        _, said = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == -signal.SIGKILL
    assert "error: process 0 of 2 ended or hangs (did not answer within 1 s); see its messages" in said
    assert "Traceback" not in said


def test_a_tenth_of_the_time_until_the_kill_is_for_the_last_writes() -> None:
    for grace, left in ((20.0, 18.0), (600.0, 595.0)):
        asked = StopRequest(grace)
        with asked.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            asked.check(saved_in=left - 1)
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= left
            with pytest.raises(Interrupted):
                asked.check(saved_in=left + 0.1)


def test_nothing_is_broken_off_within_a_shield() -> None:
    asked, after = StopRequest(grace=0.3), []
    with pytest.raises(Interrupted), asked.listening(), asked.shielded():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        after.append(1)
    assert after


def test_who_is_who() -> None:
    assert launched({"RANK": "1", "WORLD_SIZE": "4"}) == (1, 4)
    assert launched({"RANK": "x"}) == launched({"RANK": "4", "WORLD_SIZE": "4"}) == (0, 1)


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    _refuse_device("cuda", 2, each_its_own=True)  # a scheduler may show each process one of its own
    for count, device, says in ((2, "cuda", "more than the 1 GPUs"), (2, "mps", "'mps'"), (2, "cuda:1", "'cuda:1'")):
        with pytest.raises(UsageError, match=says), team(count, device, follow):
            pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="contradicts the launcher's 3"), team(2, "cpu", follow):
        pass


def test_more_processes_than_images_in_an_update_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--micro-batch", "1", "--grad-accum", "2", "--num-processes", "3", "--out", str(tmp_path / "run")]
    assert run([*SMALL, *few]) == 2
    assert "3 processes are more than the 2 images of an update" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


SMALL = (
    "train --reward brightness --model tiny --samples-per-epoch 24 --group-size 4 --micro-batch 4 --grad-accum 3 --steps 4 "
    "--train-steps first:3 --eval-images 8 --eval-every 2 --epochs 3 --ema 0.5"
).split()  # six updates


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / FILE_NAME)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> None:
    """The LoRA to 1e-3 and the metrics of both."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours)
    assert difference**0.5 <= 1e-3 * sum(float(value.square().sum()) for value in theirs.values()) ** 0.5
    for mine, other_row in zip(metrics(one), metrics(other), strict=True):
        assert mine.keys() == other_row.keys()
        for name in ("images", "reward_mean", "reward_std", "clip_fraction", "learning_rate", "approx_kl", "grad_norm"):
            assert mine[name] == pytest.approx(other_row[name], rel=1e-3, abs=1e-6), name
        assert mine["terms"]["brightness"] == pytest.approx(other_row["terms"]["brightness"], rel=1e-3)
    evaluations = [json.loads((f / "evaluations.jsonl").read_text().splitlines()[-1]) for f in (one, other)]
    assert evaluations[0]["rewards"] == pytest.approx(evaluations[1]["rewards"], abs=1e-4)


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    assert run([*SMALL, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("count", ["2", pytest.param("3", marks=pytest.mark.slow)])
def test_a_run_of_several_processes_is_the_run_of_one_and_goes_on_with_one(
    count: str, by_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient, waited = Processes.be_patient, []

    def noted(place: Processes, seconds: float) -> None:
        waited.append((place._patience, seconds))
        patient(place, seconds)

    monkeypatch.setattr(Processes, "be_patient", noted)
    assert run([*SMALL, "--out", str(tmp_path / "run"), "--num-processes", count]) == 0
    same(tmp_path / "run", by_one)
    assert waited == [(1800.0, 600.0)]  # while the model is loaded, and from then on
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == int(count)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not multiprocessing.active_children()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "epoch_0003")
    assert run(["train", "--resume", str(tmp_path / "run"), "--num-processes", "1"]) == 0
    same(tmp_path / "run", by_one)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 1


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_and_another_number_goes_on(by_one: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "texforce_cli", *SMALL, "--out", str(out), "--num-processes", "2"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoints" / "epoch_0001").exists():
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        follower = next(pid for pid in children(job.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(follower, signal.SIGKILL)
        _, said = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 1
    assert "process 1 of 2 ended or hangs" in " ".join(said.split())
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    assert run(["train", "--resume", str(out), "--num-processes", "3"]) == 0
    same(out, by_one)


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_before_the_others_have_drawn_their_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress, batches = TrainingRun._progress, []

    def killing(self: TrainingRun, phase: str, done: int, total: int, **reward: float) -> None:
        if phase == "sampling":
            batches.append(done)
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
        progress(self, phase, done, total, **reward)

    monkeypatch.setattr(TrainingRun, "_progress", killing)
    assert run([*SMALL, "--out", str(tmp_path / "run"), "--num-processes", "2"]) == 1
    assert "process 1 of 2 ended or hangs" in " ".join(capsys.readouterr().err.split())
    assert len(batches) == 1  # of three


@pytest.mark.slow
def test_ctrl_c_while_the_processes_start_is_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "texforce_cli", *SMALL, "--out", str(tmp_path / "run"), "--num-processes", "2"]
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which in the background nobody does
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heeds)
    try:
        deadline = time.monotonic() + 120
        while not any(b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(job.pid)):
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)  # it imports torch
        os.killpg(job.pid, signal.SIGINT)  # as a terminal does, to all
        _, said = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 130
    assert "Traceback" not in said


@pytest.mark.slow
def test_nothing_is_left_of_a_job_whose_leader_is_killed(tmp_path: Path) -> None:
    out, places = tmp_path / "run", tmp_path / "places"
    places.mkdir()
    command = [sys.executable, "-m", "texforce_cli", *SMALL, "--out", str(out), "--num-processes", "2"]
    job = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(places)})
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoints" / "epoch_0001").exists():
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        others = children(job.pid)
        assert others and list(places.glob("texforce-*"))
    finally:
        job.kill()
        job.wait()
    deadline = time.monotonic() + 20
    while any(map(works, others)) or list(places.glob("texforce-*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def works(pid: int) -> bool:
    """Whether there is such a process, and not only its name."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "-m"],
        ["torch.distributed.run", "--nproc-per-node", "2", "-m"],
    ],
    ids=["accelerate", "torchrun"],
)
def test_the_processes_of_a_launcher_share_a_run(launcher: list[str], by_one: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", *launcher, "texforce_cli", *SMALL, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("run folder:") == 1  # one process speaks
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    same(tmp_path / "run", by_one)


@pytest.mark.slow
def test_the_processes_of_two_machines_share_a_run(by_one: Path, tmp_path: Path) -> None:
    """Two launchers that know of each other by an address alone, as on two machines; only the first one's folder is used."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
    launch += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    jobs = [
        subprocess.Popen(
            [
                *launch,
                "--machine_rank",
                str(rank),
                "-m",
                "texforce_cli",
                *SMALL,
                "--out",
                str(tmp_path / f"run-{rank}"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [job.communicate(timeout=300)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], said
    assert ["run folder:" in text for text in said] == [True, False]
    assert json.loads((tmp_path / "run-0" / "run.json").read_text())["processes"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run-0"]
    same(tmp_path / "run-0", by_one)
