"""Rewards in processes of their own: what they say arrives, and what they break costs no run."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, Literal, Optional
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from texforce_cli.cli.app import run
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.judging import offline
from texforce_cli.judging.judge import Failed
from texforce_cli.prompts import load_prompts
from texforce_cli.prompts.heldout import heldout_pairs
from texforce_cli.rewards import isolation, worker
from texforce_cli.rewards.isolation import IsolatedReward, RewardFailure, WorkerFailure, WorkerSettings, ask_once
from texforce_cli.rewards.places import Place
from texforce_cli.rewards.registry import Registry, RewardInfo, load_registry
from texforce_cli.rewards.sharing import Lender, Lent
from texforce_cli.rewards.terms import RewardSet, TermSpec, parse_terms
from texforce_cli.workflows import plan

Make = Callable[..., IsolatedReward]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """`make(body, **settings)`: a reward whose `score` has that body, in a worker of this interpreter."""
    folder = tmp_path / "site"
    folder.mkdir()
    python = interpreter_that_sees(folder, tmp_path)
    made: list[IsolatedReward] = []

    def build(body: str, options: dict[str, str] | None = None, start: str = "pass", **settings: Any) -> IsolatedReward:
        name = f"reward{len(made)}_{time.monotonic_ns()}"
        (folder / f"{name}.py").write_text(
            "import os, signal, sys, time\nfrom pathlib import Path\nimport numpy as np\n\n"
            "class R:\n    input = 'uint8'\n    counts = {}\n"
            f"    def __init__(self, mark: str = '', number: int = 1):\n        self.mark, self.number = mark, number\n"
            f"{textwrap.indent(start, ' ' * 8)}\n"
            f"    def score(self, images, prompts, metadata):\n{textwrap.indent(textwrap.dedent(body), ' ' * 8)}\n"
        )
        settings = {"timeout": 20.0, "start_timeout": 30.0, **settings}
        reward = IsolatedReward("r", f"{name}:R", options or {}, [Place(str(python))], WorkerSettings(**settings))
        made.append(reward)
        return reward

    yield build
    for reward in made:
        reward.close()


def interpreter_that_sees(folder: Path, tmp_path: Path) -> Path:
    """A virtual environment whose interpreter imports from `folder` and from what this one has installed."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    site = next(environment.glob("lib/python*/site-packages"))
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "paths.pth").write_text(f"{folder}\n{ours}\n")
    return environment / "bin" / "python"


def images(*levels: int) -> np.ndarray:
    return np.stack([np.full((4, 6, 3), level, np.uint8) for level in levels])


def ask(reward: IsolatedReward, *levels: int) -> list[Any]:
    return reward.score(images(*levels), [f"p{level}" for level in levels], [{"level": level} for level in levels])


MEAN = "return images.mean((1, 2, 3))"
CHILD = "import subprocess; Path(self.mark).write_text(str(subprocess.Popen(['sleep', '60']).pid))"


def test_scores_come_back_in_order_and_everything_arrives(make: Make) -> None:
    assert ask(make(MEAN), 3, 1, 2) == [3.0, 1.0, 2.0]
    reward = make("return [len(p) + m['level'] * self.number for p, m in zip(prompts, metadata)]", {"number": "10"})
    assert ask(reward, 5, 70) == [2 + 50, 3 + 700]
    assert 5e6 < reward.memory < 1e9


def test_pictures_arrive_as_pil_images_where_the_class_says_nothing(make: Make) -> None:
    reward = make("return [image.size[0] + image.getpixel((0, 0))[1] for image in images]", start="R.input = 'pil'")
    assert ask(reward, 1, 2) == [7.0, 8.0]


def test_a_batch_above_the_largest_payload_is_sent_in_parts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = make("return [len(images)] * len(images)")
    monkeypatch.setattr(worker, "LARGEST_PAYLOAD", 2 * 4 * 6 * 3)  # two pictures
    pids = reward.pids
    assert ask(reward, 1, 2, 3, 4, 5) == [2.0, 2.0, 1.0, 2.0, 2.0]
    assert (reward.warnings(), reward.pids) == ([], pids)


def test_the_workers_of_this_machine_are_spread_over_its_devices(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = "return [float(os.environ.get('CUDA_VISIBLE_DEVICES', '-1'))] * len(images)"
    monkeypatch.setattr(isolation, "visible_devices", lambda: ["3", "7"])
    assert ask(make(seen, workers=3), 1, 2, 3) == [3.0, 7.0, 3.0]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert ask(make(seen), 1) == [-1.0]  # one worker sees what this process sees
    monkeypatch.setattr(isolation, "visible_devices", list)
    assert ask(make(seen, workers=2), 1, 2) == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("count", "named", "expected"),
    [(2, None, ["0", "1"]), (2, "5, GPU-1f", ["5", "GPU-1f"]), (1, "5,-1,6", ["5"]), (0, "", [])],
)
def test_devices_are_named_as_this_process_was_given_them(
    monkeypatch: pytest.MonkeyPatch, count: int, named: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert isolation.visible_devices() == expected


def test_several_workers_share_a_batch_in_order(make: Make) -> None:
    reward = make("return [os.getpid() * 1000 + i.mean() for i in images]", workers=2)
    answers = ask(reward, 1, 2, 3, 4, 5)
    assert [round(value) % 1000 for value in answers] == [1, 2, 3, 4, 5]
    assert len({round(value) // 1000 for value in answers}) == 2
    assert ask(reward, 9)[0] % 1000 == 9  # fewer pictures than workers


def test_prints_do_no_harm(make: Make) -> None:
    body = "print('x' * 100_000, flush=True); os.system('echo loud'); os.write(1, b'raw'); " + MEAN
    assert ask(make(body, start="print('hello'); sys.stdin.read()"), 4) == [4.0]


ONCE = "mark = Path(self.mark); first = not mark.exists(); mark.touch()\nif first: {}\n" + MEAN


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("os._exit(3)", "exit code 3"),
        ("time.sleep(60)", "within 1 seconds"),
        ("print('last words', file=sys.stderr, flush=True); os._exit(1)", "last words"),
    ],
)
def test_a_worker_that_dies_in_mid_batch_is_asked_again(make: Make, tmp_path: Path, what: str, said: str) -> None:
    reward = make(ONCE.format(what), {"mark": str(tmp_path / "mark")}, timeout=1.0 if "sleep" in what else 20.0)
    before = reward.pids
    assert ask(reward, 7, 8) == [7.0, 8.0]
    assert reward.pids != before
    (warning,) = reward.warnings()
    assert said in warning and "started again" in warning


@pytest.mark.parametrize("what", ["os._exit(9)", "raise ValueError('not this one')"])
def test_one_poisoned_picture_costs_that_picture(make: Make, what: str) -> None:
    reward = make(f"if (images == 66).any(): {what}\n" + MEAN)
    assert ask(reward, 5, 66, 4, 9, 8) == [5.0, None, 4.0, 9.0, 8.0]
    warnings = reward.warnings()
    assert "failed on a picture of the prompt 'p66'" in warnings[-1]
    assert warnings[-1].endswith("it gets the worst score of the others")
    assert reward.warnings() == []


def test_a_reward_that_always_fails_ends_the_run_soon(make: Make, tmp_path: Path) -> None:
    reward = make(
        "with open(self.mark, 'a') as f: f.write('.')\nraise RuntimeError('no model')", {"mark": str(tmp_path / "mark")}
    )
    with pytest.raises(TexforceError, match=r"reward 'r' failed on a picture of the prompt 'p\d'.*no model"):
        ask(reward, *range(16))
    assert len((tmp_path / "mark").read_text()) < 12


def test_a_wrong_count_breaks_the_contract_and_is_named(make: Make) -> None:
    with pytest.raises(TexforceError, match="reward 'r' returned 1 values for 2 images"):
        ask(make("return [1.0]"), 1, 2)


def test_numbers_that_are_not_finite_arrive_as_they_are(make: Make) -> None:
    found = ask(make("return [float('nan'), float('inf')]"), 1, 2)
    assert np.isnan(found[0]) and found[1] == np.inf


def test_a_reward_elsewhere_that_answers_nan_in_a_run_is_named_with_the_prompt(make: Make) -> None:
    one = make("return np.where(images.mean((1, 2, 3)) == 66, np.nan, 1.0)")._workers[0]
    registry = Registry({("r", ""): RewardInfo("r", one._start["factory"], "x", "1")})
    rewards = RewardSet([TermSpec("r")], registry, hosts={"r": [one.place]})
    try:
        with pytest.raises(TexforceError, match="reward 'r' returned nan for the prompt 'p66'"):
            rewards.score(images(5, 66), ["p5", "p66"], [{}] * 2)
        assert rewards.score(images(5), ["p5"], [{}])["r"].tolist() == [1.0]
    finally:
        rewards.close()


def test_a_slow_start_is_waited_for_and_one_that_never_ends_is_not(make: Make) -> None:
    assert ask(make(MEAN, start="time.sleep(1.5)", timeout=1.0), 1) == [1.0]
    begun = time.monotonic()
    with pytest.raises(TexforceError, match=r"did not answer within 0.5 seconds, 3 times in a row"):
        make(MEAN, start="time.sleep(60)", start_timeout=0.5)
    assert time.monotonic() - begun < 20


def test_a_worker_that_ends_while_it_starts_is_named(make: Make) -> None:
    begun = time.monotonic()
    with pytest.raises(TexforceError, match=r"ended with exit code 5, 3 times in a row"):
        make(MEAN, start="os._exit(5)")
    assert time.monotonic() - begun > 0.5 + 2.0  # it waits longer before each new try
    with pytest.raises(TexforceError, match=r"could not start: ImportError: no such thing"):
        make(MEAN, start="raise ImportError('no such thing')")
    with pytest.raises(TexforceError, match=r"it has no option 'nmber'; its options: mark, number"):
        make(MEAN, {"nmber": "2"})
    with pytest.raises(TexforceError, match=r"'two' is no value for its option 'number'; give a int"):
        make(MEAN, {"number": "two"})


def test_a_module_that_ends_the_process_when_it_is_imported_is_named(make: Make, tmp_path: Path) -> None:
    place = make(MEAN)._workers[0].place
    (tmp_path / "site" / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(
        TexforceError, match=r"reward 'r' could not start: .* it tried to end the process \(SystemExit\)"
    ):
        IsolatedReward("r", "leaves:R", {}, [place], WorkerSettings())


def test_an_entry_point_may_name_an_object_of_a_module(make: Make, tmp_path: Path) -> None:
    place = make(MEAN)._workers[0].place
    info = tmp_path / "site" / "third-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[texforce]\nthird = third:plugin\nagain = third:plugin\n")
    (tmp_path / "site" / "third.py").write_text(
        "class Plugin:\n    def texforce_register_rewards(self, register):\n        register('glow', 'x:Y', api_version=1)\n"
        "plugin = Plugin()\n"
    )
    found = ask_once(place, {"type": "describe"})["rewards"]
    assert found.count({"name": "glow", "factory": "x:Y", "distribution": "third", "api_version": 1}) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_memory_that_grows_without_bounds_ends_in_an_error(make: Make) -> None:
    reward = make("if images.max() > 9: bytearray(3_000_000_000)\n" + MEAN, memory_gb=2.0)
    assert ask(reward, 1, 10) == [1.0, None]
    assert "MemoryError" in reward.warnings()[-1]


def test_counts_survive_a_restart(make: Make, tmp_path: Path) -> None:
    body = "R.counts['seen'] = R.counts.get('seen', 0) + len(images)\nif images.max() > 9: os._exit(1)\n" + MEAN
    reward = make(body)
    ask(reward, 1, 2, 3)
    ask(reward, 4)
    assert reward.counts == {"seen": 4}
    ask(reward, 5, 66)  # twice ended, halved: 5 alone is counted, 66 is not
    assert reward.counts == {"seen": 5}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's PR_SET_PDEATHSIG")
def test_a_worker_ends_with_its_parent_even_while_it_holds_the_interpreter(make: Make, tmp_path: Path) -> None:
    reward = make("import ctypes; ctypes.PyDLL(None).sleep(60)")  # only for its interpreter and module
    assert eventually_gone(worker_of_a_killed_trainer(reward)), "the worker outlived its parent by five seconds"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's PR_SET_PDEATHSIG")
@pytest.mark.parametrize(
    "busy", ["", "import ctypes; ctypes.PyDLL(None).sleep(60)", f"os.killpg(0, signal.SIGTERM); {CHILD}"]
)
def test_what_a_worker_has_started_ends_with_its_parent(make: Make, tmp_path: Path, busy: str) -> None:
    reward = make(f"{busy}\ntime.sleep(60)", {"mark": str(tmp_path / "pid")}, start=CHILD)
    reward.close()
    assert eventually_gone(worker_of_a_killed_trainer(reward))
    assert eventually_gone(int((tmp_path / "pid").read_text())), "it outlived the trainer by five seconds"


@pytest.mark.skipif(sys.platform == "win32", reason="os.fork")
def test_a_schedulers_sigterm_ends_no_worker_and_a_worker_can_end_its_children_by_it(make: Make) -> None:
    body = """
        os.kill(os.getpid(), signal.SIGTERM)
        begun, begin = os.pipe()
        child = os.fork() or (os.write(begin, b"!"), time.sleep(60))
        os.read(begun, 1)
        os.kill(child, signal.SIGTERM)
        return [float(os.waitpid(child, 0)[1])]
        """
    reward = make(body)
    assert (ask(reward, 1), reward.warnings()) == ([signal.SIGTERM], [])


def worker_of_a_killed_trainer(reward: IsolatedReward) -> int:
    """The process that scores for a trainer that was killed in mid batch."""
    program = textwrap.dedent(
        f"""
        import sys, time, numpy as np
        from texforce_cli.rewards.isolation import Worker, WorkerSettings
        from texforce_cli.rewards.places import Place
        w = Worker(Place({reward._workers[0].place.python!r}), {dict(reward._workers[0]._start)!r}, WorkerSettings())
        w.ensure()
        print(w.pid, flush=True)
        w.score(np.zeros((1, 2, 2, 3), np.uint8), ["p"], [{{}}])
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.5)
    os.kill(pid, 0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    return pid


def eventually_gone(pid: int) -> bool:
    """Whether the process ends, or waits to be buried, within five seconds."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().split(") ")[1][0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("child", ["time.sleep(30)", "os.setsid(); time.sleep(15)"])
def test_the_time_out_holds_when_the_reward_has_children(make: Make, child: str) -> None:
    reward = make(f"if os.fork() == 0: {child}; os._exit(0)\ntime.sleep(30)", timeout=0.5, failures=1)
    begun = time.monotonic()
    with pytest.raises(TexforceError, match=r"within 0.5 seconds"):
        ask(reward, 1)
    assert time.monotonic() - begun < 10


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_what_a_worker_has_started_ends_with_its_stdin(make: Make, tmp_path: Path) -> None:
    (one,) = make("pass", {"mark": str(tmp_path / "pid")}, start=CHILD)._workers
    command = [one.place.python, "-I", worker.__file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        worker.write_frame(process.stdin, one._start)  # type: ignore[arg-type]
        assert worker.read_frame(process.stdout)[0]["type"] == "ready"  # type: ignore[arg-type]
    assert eventually_gone(int((tmp_path / "pid").read_text()))


def test_a_worker_ends_with_its_stdin_also_in_mid_batch(make: Make, tmp_path: Path) -> None:
    """As one does on another machine, whose parent the kernel does not know."""
    (one,) = make("Path(self.mark).touch()\ntime.sleep(60)", {"mark": str(tmp_path / "mark")})._workers
    command = [one.place.python, "-I", worker.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None and process.stdout is not None
        worker.write_frame(process.stdin, one._start)  # type: ignore[arg-type]
        assert worker.read_frame(process.stdout)[0]["type"] == "ready"  # type: ignore[arg-type]
        batch = {"type": "score", "shape": [1, 1, 1, 3], "prompts": ["p"], "metadata": [{}]}
        worker.write_frame(process.stdin, batch, b"rgb")  # type: ignore[arg-type]
        for _ in range(200):
            if (tmp_path / "mark").exists():
                break
            time.sleep(0.05)
        assert process.poll() is None
        process.stdin.close()
        try:
            process.wait(10)
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="a script as an interpreter")
def test_an_interpreter_that_speaks_another_protocol_is_ended_and_quoted(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho HTTP/1.1 400 Bad Request\nexec sleep 60\n")
    (tmp_path / "python").chmod(0o755)
    one = isolation.Worker(Place(str(tmp_path / "python")), {}, WorkerSettings())
    one.ensure()
    pid = one.pid
    with pytest.raises(WorkerFailure, match=r"does not speak this protocol \(it said b'HTTP'\)"):
        one.ask({"type": "describe"}, timeout=20)
    assert pid is not None and eventually_gone(pid) and not one.alive


def test_closing_while_a_batch_is_out_starts_nothing_again(make: Make) -> None:
    reward = make("time.sleep(30)", workers=2)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(ask, reward, 1, 2)
        time.sleep(0.7)
        pids = reward.pids
        begun = time.monotonic()
        reward.close()
        assert time.monotonic() - begun < 5
        with pytest.raises(TexforceError, match="was closed"):
            future.result(10)
    time.sleep(0.3)
    assert len(pids) == 2 and reward.pids == []


def test_a_worker_that_dies_between_batches_is_started_again_and_said(make: Make) -> None:
    reward = make("R.counts['seen'] = R.counts.get('seen', 0) + len(images)\n" + MEAN)
    ask(reward, 1, 2, 3)
    os.kill(reward.pids[0], signal.SIGKILL)
    time.sleep(0.3)
    assert ask(reward, 4) == [4.0]
    assert reward.counts == {"seen": 4}
    assert "ended between two batches" in reward.warnings()[0]


def test_a_picture_that_fails_gets_the_worst_score_of_the_epoch_whatever_its_batch(make: Make) -> None:
    start = make("if (images == 66).any(): os._exit(9)\n" + MEAN)._workers[0]
    factory, place = start._start["factory"], start.place
    registry = Registry(
        {(name, ""): RewardInfo(name, factory, "x", "1", higher_is_better=name != "less") for name in ("more", "less")}
    )
    terms = parse_terms(["more", "less"])
    rewards = RewardSet(terms, registry, hosts={"more": [place], "less": [place]})
    try:
        for batches in ([(66,), (5, 4), (8,)], [(66, 5, 4, 8)], [(66, 8), (4, 5)]):
            scored = [rewards.score(images(*levels), ["a"] * len(levels), [{}] * len(levels)) for levels in batches]
            found = rewards.total({name: np.concatenate([one[name] for one in scored]) for name in ("more", "less")})
            assert (found.terms["more"][0], found.terms["less"][0], found.total[0]) == (4.0, 8.0, -4.0)
        with pytest.raises(TexforceError, match="reward 'more' could score none of 1 pictures"):
            rewards.total(rewards.score(images(66), ["a"], [{}]))
    finally:
        rewards.close()


def test_without_a_substitute_a_picture_that_fails_is_nan_and_named(make: Make) -> None:
    one = make("if (images == 66).any(): raise ValueError('no')\n" + MEAN)._workers[0]
    registry = Registry({("r", ""): RewardInfo("r", one._start["factory"], "x", "1")})
    rewards = RewardSet([TermSpec("r")], registry, hosts={"r": [one.place]}, workers=WorkerSettings(substitute=False))
    try:
        assert np.isnan(rewards.score(images(66), ["p66"], [{}])["r"]).tolist() == [True]  # the very first one
        found = rewards.score(images(5, 66, 4), ["p5", "p66", "p4"], [{}] * 3)["r"]
        assert np.array_equal(found, [5.0, np.nan, 4.0], equal_nan=True)
        first, second = rewards.warnings()
        assert "prompt 'p66'" in second and first.endswith("it has no score")
        with pytest.raises(TexforceError, match="and on more"):
            rewards.score(images(66, 66, 66), ["p66"] * 3, [{}] * 3)
    finally:
        rewards.close()


def test_without_a_substitute_a_reward_that_answers_nan_is_named_too(make: Make) -> None:
    reward = make("return np.where(images.mean((1, 2, 3)) == 66, np.nan, 1.0)", substitute=False)
    assert ask(reward, 5, 66) == [1.0, None]
    assert reward.warnings() == ["reward 'r' returned nan for the prompt 'p66'; it has no score"]
    with pytest.raises(TexforceError, match=r"reward 'r' returned nan for the prompt 'p66', and on more"):
        ask(reward, 66, 66, 66)


def test_a_held_out_picture_that_cannot_be_scored_is_left_out_of_a_watch_and_the_worst_of_a_reward(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best, poison = (prompt.text for prompt in heldout_pairs(load_prompts("color", "tiny"), 4)[0][2:])  # not trained on
    body = f"if {poison!r} in prompts: raise ValueError('no')\nreturn [10.0 if p == {best!r} else 1.0 for p in prompts]"
    one = make(body)._workers[0]
    environment = mock.Mock(place=one.place, sites=[], in_use=contextlib.nullcontext)
    registry = load_registry()
    registry.rewards["r", ""] = RewardInfo("r", one._start["factory"], "x", "1", environment=environment)
    monkeypatch.setattr(plan, "load_registry", lambda: registry)
    options = "--samples-per-epoch 8 --group-size 4 --micro-batch 2 --grad-accum 1 --steps 2 --eval-images 4 --epochs 1"
    given = [*options.split(), "--prompts", "color", "--watch", "r", "--out", str(tmp_path / "run")]
    assert run(["train", "--reward", "r", "--model", "tiny", *given]) == 0
    assert f"failed on a picture of the prompt '{poison}'" in " ".join(capsys.readouterr().err.split())
    measured = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text())
    assert (measured["rewards"], measured["watched"]["r"]["difference"]["n"]) == ([1.0, 1.0, 10.0, 1.0], 3)


def test_the_judge_clip_has_no_verdict_on_a_picture_that_an_isolated_reward_cannot_score(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make("if images.max() > 60: raise ValueError('no')\n" + MEAN)._workers[0]
    environment = mock.Mock(place=one.place, sites=[], in_use=contextlib.nullcontext)
    registry = Registry({("r", ""): RewardInfo("r", one._start["factory"], "x", "1", environment=environment)})
    monkeypatch.setattr(offline, "load_registry", lambda: registry)
    paths = [tmp_path / f"{level}.png" for level in (5, 66)]
    for path, picture in zip(paths, images(5, 66), strict=True):
        Image.fromarray(picture).save(path)
    question = mock.Mock(files=paths, hashes=["a", "b"], prompt="p")
    with contextlib.closing(offline.ClipJudge("r")) as judge:
        judge.prepare([], "")
        assert judge._score(question, 0) == 5.0
        with pytest.raises(Failed, match=r"'66.png' could not be scored: .*ValueError: no"):
            judge._score(question, 1)


def test_in_batches_of_one_picture_three_failures_in_a_row_end_it(make: Make) -> None:
    reward = make("if images.max() > 60: raise ValueError('no')\n" + MEAN)
    assert [ask(reward, level)[0] for level in (66, 3, 67, 68)] == [None, 3.0, None, None]
    with pytest.raises(TexforceError, match=r"raised ValueError: no\), and on more"):
        ask(reward, 69)


def test_counts_may_be_numbers_of_numpy(make: Make) -> None:
    reward = make("R.counts['odd'] = np.int64(3)\n" + MEAN)
    ask(reward, 1)
    assert reward.counts == {"odd": 3}


def test_a_host_without_a_name_needs_a_reward_with_an_environment() -> None:
    registry = Registry({("r", ""): RewardInfo("r", "x:Y", "x", "1")})
    with pytest.raises(UsageError, match=r"--reward-host names no reward"):
        RewardSet([TermSpec("r")], registry, hosts={"": [Place("python3", "far")]})


def test_closing_ends_the_process_and_calls_close(make: Make, tmp_path: Path) -> None:
    reward = make(MEAN, {"mark": str(tmp_path / "mark")}, start="R.close = lambda self: Path(self.mark).touch()")
    (pid,) = reward.pids
    reward.close()
    assert (tmp_path / "mark").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_ten_thousand_batches_leave_nothing_behind(make: Make) -> None:
    def descriptors(pid: int | str) -> int:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())

    def resident(pid: int | str) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096

    batch = np.stack([np.full((64, 64, 3), level, np.uint8) for level in (1, 2)])

    def ask_often(times: int) -> None:
        for _ in range(times):
            assert reward.score(batch, ["a", "b"], [{}, {}]) == [1.0, 2.0]

    reward = make(MEAN)
    (pid,) = reward.pids
    ask_often(500)
    before = [measure(p) for measure in (descriptors, resident) for p in (pid, "self")]
    ask_often(10_000)
    after = [measure(p) for measure in (descriptors, resident) for p in (pid, "self")]
    assert reward.pids == [pid]
    assert all(now <= then for then, now in zip(before[:2], after[:2])), (
        before,
        after,
    )  # of other tests some may close
    assert all(now - then < 4e6 for then, now in zip(before[2:], after[2:])), (before, after)


def test_another_machine_is_reached_over_ssh(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = make(MEAN)._workers[0]
    tools = tmp_path / "bin"
    tools.mkdir()
    log = tmp_path / "ssh.json"
    (tools / "ssh").write_text(
        f"#!{sys.executable}\nimport json, os, sys\nopen({str(log)!r}, 'w').write(json.dumps(sys.argv[1:5]))\n"
        "print('Welcome to this machine', flush=True)\nos.execvp('sh', ['sh', '-c', sys.argv[5]])\n"
    )
    (tools / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    place = Place.parse(f"ann@far:{here.place.python}")
    reward = IsolatedReward("r", here._start["factory"], {}, [place], WorkerSettings())
    try:
        assert ask(reward, 3, 4) == [3.0, 4.0]
    finally:
        reward.close()
    assert json.loads(log.read_text()) == ["-o", "BatchMode=yes", "--", "ann@far"]


@pytest.mark.parametrize("text", ["", "-oProxyCommand=evil", "a b", ":python"])
def test_a_host_cannot_be_an_option_of_ssh(text: str) -> None:
    with pytest.raises(UsageError, match="is not user@host"):
        Place.parse(text)


def test_an_interpreter_that_is_not_there_is_named() -> None:
    with pytest.raises(WorkerFailure, match=r"could not be started \(/nowhere/python: No such file"):
        ask_once(Place("/nowhere/python"), {"type": "describe"})


def test_another_protocol_is_refused(make: Make) -> None:
    place = make(MEAN)._workers[0].place
    with pytest.raises(RewardFailure, match="protocol 2 is wanted, this worker speaks 1"):
        ask_once(place, {"type": "start", "protocol": 2, "factory": "x:Y"})
    with pytest.raises(RewardFailure, match="'dance' is unknown to protocol 1"):
        ask_once(place, {"type": "dance"})


# frames


def frame(header: Any, payload: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return b"TXF1" + struct.pack(">II", len(text), len(payload)) + text + payload


def test_a_frame_is_magic_two_lengths_json_and_bytes() -> None:
    stream = io.BytesIO()
    worker.write_frame(stream, {"a": 1}, b"xyz")
    assert stream.getvalue() == b"TXF1\x00\x00\x00\x08\x00\x00\x00\x03" + b'{"a": 1}' + b"xyz"
    stream.seek(0)
    assert worker.read_frame(stream) == ({"a": 1}, b"xyz")


@given(
    st.dictionaries(st.text(), st.integers() | st.text() | st.none()), st.binary(max_size=200), st.binary(max_size=40)
)
def test_frames_survive_the_way(header: dict[str, Any], payload: bytes, noise: bytes) -> None:
    stream = io.BytesIO(noise.replace(b"TXF1", b"") + b"\n" + frame(header, payload))
    assert worker.read_frame(stream, noise=100) == (header, payload)


@given(st.binary(max_size=300))
def test_whatever_bytes_come_end_in_one_of_two_errors(data: bytes) -> None:
    for start in (b"", b"TXF1", b"TXF1\x00\x00\x00\x02\x00\x00\x00\x00"):
        with contextlib.suppress(EOFError, worker.FrameError):
            worker.read_frame(io.BytesIO(start + data), noise=50)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"HTTP/1.1 400", "does not speak this protocol"),
        (b"TXF1" + struct.pack(">II", 2**31, 0), "too large"),
        (b"TXF1" + struct.pack(">II", 2, 2**31) + b"{}", "too large"),
        (b"TXF1" + struct.pack(">II", 2, 0) + b"[]", "no JSON object"),
        (b"TXF1" + struct.pack(">II", 3, 0) + b"\xff\xfe{", "no JSON"),
    ],
)
def test_frames_that_are_none_are_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(worker.FrameError, match=sentence):
        worker.read_frame(io.BytesIO(data))


@given(st.lists(st.integers(-3, 5), min_size=4, max_size=4), st.integers(0, 200))
def test_images_have_the_size_that_their_shape_says(shape: list[int], length: int) -> None:
    try:
        decoded = worker.decode(bytes(length), shape, "uint8")
    except worker.FrameError:
        return
    assert decoded.nbytes == length and list(decoded.shape) == shape


def test_a_worker_that_is_fed_nonsense_ends(make: Make) -> None:
    python = make(MEAN)._workers[0].place.python
    for data in (b"", b"nonsense, not a frame", frame({"type": "score"})[:9]):
        done = subprocess.run([python, "-I", worker.__file__], input=data, capture_output=True, timeout=20, check=False)
        assert (done.returncode, done.stdout) == (0, b"")


def test_an_option_has_the_type_of_its_annotation_or_is_refused() -> None:
    def factory(
        top: int | None = None, share: Optional[float] = None, names: Sequence[str] | str = "",
        how: Literal["a", "b"] = "a", file: Path = Path(), plain=1,
    ) -> None: ...  # fmt: skip

    given = {"top": "3", "share": "0.5", "names": "x,y", "how": "b", "file": "f", "plain": "1"}
    assert worker.typed_options(factory, given) == {**given, "top": 3, "share": 0.5}
    assert [option["type"] for option in worker.list_options(factory)][:3] == ["int", "float", "str"]
    for key, text, why in (("top", "x", "give a int"), ("how", "c", "give a .*'b'")):
        with pytest.raises(ValueError, match=why):
            worker.typed_options(factory, {key: text})
    for text, kind in (
        ("int | None", int),
        ("Optional[float]", float),
        ("Optional[Path]", "Path"),
    ):  # before Python 3.10
        assert worker._kind(inspect.Parameter("top", inspect.Parameter.KEYWORD_ONLY, annotation=text)) == kind


def test_the_worker_is_one_file_of_the_standard_library(tmp_path: Path) -> None:
    alone = tmp_path / "worker.py"
    shutil.copy(worker.__file__, alone)
    command = [sys.executable, "-I", "-S", str(alone)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        worker.write_frame(process.stdin, {"type": "stop"})  # type: ignore[arg-type]
        header, _ = worker.read_frame(process.stdout)  # type: ignore[arg-type]
    assert header["type"] == "stopped"


def test_scoring_goes_on_while_the_trainer_draws(make: Make) -> None:
    slow = make("time.sleep(0.7); " + MEAN)._workers[0]
    registry = Registry({("slow", ""): RewardInfo("slow", slow._start["factory"], "somebody", "1")})
    rewards = RewardSet([TermSpec("slow")], registry, hosts={"slow": [slow.place]})
    try:
        begun = time.monotonic()
        futures = [rewards.submit(images(level), ["p"], [{}]) for level in (3, 4)]
        assert time.monotonic() - begun < 0.5
        assert [future.result()["slow"].tolist() for future in futures] == [[3.0], [4.0]]
    finally:
        rewards.close()


def test_the_workers_of_one_process_are_lent_to_another(make: Make) -> None:
    worker = make("if images.max() > 250: raise ValueError('no')\n" + MEAN)._workers[0]
    registry = Registry({("r", ""): RewardInfo("r", worker._start["factory"], "x", "1")})
    owner = RewardSet([TermSpec("r")], registry, hosts={"r": [worker.place]})
    address = owner.lend()
    assert address is not None and address.key.hex() not in repr(address.place)
    borrowers = [RewardSet([TermSpec("r")], registry, hosts={"r": [worker.place]}, lender=address) for _ in range(3)]
    try:
        levels = [range(i, i + 20) for i in range(4)]
        asked = [
            one.submit(images(*own), ["a"] * 20, [{}] * 20)
            for one, own in zip([owner, *borrowers], levels, strict=True)
        ]
        assert [future.result(20)["r"].tolist() for future in asked] == [[float(x) for x in own] for own in levels]
        isolated = owner._terms[0].reward
        assert isinstance(isolated, IsolatedReward) and len(isolated.pids) == 1
        with pytest.raises(TexforceError, match=r"'r' failed on a picture of the prompt 'a'.*ValueError: no") as caught:
            borrowers[0].score(images(251, 252, 253), ["a"] * 3, [{}] * 3)
        assert caught.value.hint == "try it alone: texforce rewards check r"
        assert borrowers[1].score(images(7), ["a"], [{}])["r"].tolist() == [7.0]
        with pytest.raises(AuthenticationError):
            Client(address.place, authkey=b"another")
        assert borrowers[2].score(images(8), ["a"], [{}])["r"].tolist() == [8.0]
    finally:
        for one in [*borrowers, owner]:
            one.close()
    with pytest.raises(TexforceError, match="the process that owns the workers of reward 'r' has ended"):
        RewardSet([TermSpec("r")], registry, hosts={"r": [worker.place]}, lender=address)


def test_a_borrower_waits_longer_than_a_batch_may_take_the_owner(make: Make) -> None:
    place = make(MEAN)._workers[0].place
    lender = Lender({"r": Slow(0)})  # type: ignore[dict-item]
    registry = Registry({("r", ""): RewardInfo("r", "x:Y", "x", "1")})
    settings = WorkerSettings(timeout=5000.0)  # the batch is asked again, so that twice as much is no failure yet
    borrower = RewardSet([TermSpec("r")], registry, hosts={"r": [place]}, lender=lender.address, workers=settings)
    try:
        lent = borrower._terms[0].reward
        assert isinstance(lent, Lent) and lent.timeout > 2 * 5000
    finally:
        borrower.close()
        lender.close()


class Slow:
    """What a lender lends: answers after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def score(self, images: Any, prompts: Any, metadata: Any) -> list[float]:
        time.sleep(self.seconds)
        return [1.0] * len(images)


def test_workers_are_lent_where_a_socket_below_the_temporary_folder_would_have_too_long_a_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(deep))  # type: ignore[attr-defined]
    lender = Lender({"r": Slow(0)})  # type: ignore[dict-item]
    borrower = Lent("r", pickle.loads(pickle.dumps(lender.address)), timeout=5)
    assert borrower.score(images(1), ["p"], [{}]) == [1.0]
    with pytest.raises(AuthenticationError):
        Client(lender.address.place, authkey=b"another")
    borrower.close()
    lender.close()


@pytest.mark.parametrize("manner", ["broken", "silent"])
def test_a_handshake_that_fails_does_not_end_the_lending(manner: str) -> None:
    lender = Lender({"r": Slow(0)})  # type: ignore[dict-item]
    try:
        stranger = Client(lender.address.place)
        if manner == "broken":
            stranger.send_bytes(b"nonsense")
            stranger.close()
        borrower = Lent("r", lender.address, timeout=5)
        assert borrower.score(images(1), ["p"], [{}]) == [1.0]
        borrower.close()
        stranger.close()
    finally:
        lender.close()


def test_an_owner_that_does_not_answer_is_not_waited_for_for_ever() -> None:
    lender = Lender({"r": Slow(3)})  # type: ignore[dict-item]
    try:
        with pytest.raises(TexforceError, match=r"workers of reward 'r' has not answered for 0.5 seconds"):
            Lent("r", lender.address, timeout=0.5).score(images(1), ["p"], [{}])
    finally:
        lender.close()


def test_an_isolated_reward_scores_while_those_of_this_process_do(make: Make, tmp_path: Path) -> None:
    """Each waits until the other has begun."""
    wait = (
        "Path(self.mark, {!r}).touch()\n"
        "for _ in range(500):\n    if Path(self.mark, {!r}).exists(): break\n    time.sleep(0.01)\n"
        "else:\n    raise RuntimeError('alone')\n" + MEAN
    )
    one = make(wait.format("there", "here"), {"mark": str(tmp_path)})._workers[0]
    two = make(wait.format("here", "there"), {"mark": str(tmp_path)})._workers[0]
    registry = Registry(
        {(name, ""): RewardInfo(name, w._start["factory"], "x", "1") for name, w in (("far", one), ("near", two))}
    )
    options = {"mark": str(tmp_path)}
    sys.path.insert(0, str(tmp_path / "site"))
    rewards = RewardSet(
        [TermSpec("near", options=options), TermSpec("far", options=options)],
        registry,
        hosts={"far": [one.place]},
        workers=WorkerSettings(10),
    )
    try:
        found = rewards.submit(images(3, 4), ["a", "b"], [{}] * 2).result(20)
        assert [(name, values.tolist()) for name, values in found.items()] == [("near", [3, 4]), ("far", [3, 4])]
        assert list(rewards.score(images(5), ["a"], [{}])) == ["near", "far"]
    finally:
        sys.path.remove(str(tmp_path / "site"))
        rewards.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
SCORES = st.lists(st.floats() | st.integers() | st.just(10**400), min_size=2, max_size=2)


@given(
    st.fixed_dictionaries(
        {},
        optional={"type": JSON | st.just("error"), "error": JSON, "wrong_count": JSON, "memory": JSON, "counts": JSON},
    ),
    JSON | SCORES,
)
@example({"counts": {"no face": "three"}}, [1.0, 2.0])
@example({"counts": {"no face": None}, "memory": "much"}, [1, 10**400])
def test_whatever_a_worker_answers_is_two_scores_or_one_of_three_failures(answer: dict[str, Any], scores: Any) -> None:
    one = isolation.Worker(Place("nowhere"), {}, WorkerSettings())
    with (
        mock.patch.object(isolation, "_exchange", lambda *_: {**answer, "scores": scores}),
        contextlib.suppress(WorkerFailure, RewardFailure, isolation.WrongCount),
    ):
        found = one.score(images(1, 2), ["a", "b"], [{}, {}])
        assert [type(value) for value in found] == [float, float]
    assert isinstance(sum((Counter(one.counts), Counter(seen=1)), Counter()).total(), int)
    assert isinstance(one.memory, int)
