"""Rewards in processes of their own: what they say arrives, and what they break costs no run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.rewards import worker
from texforce_cli.rewards.isolation import IsolatedReward, RewardFailure, WorkerFailure, WorkerSettings, ask_once
from texforce_cli.rewards.places import Place
from texforce_cli.rewards.registry import Registry, RewardInfo
from texforce_cli.rewards.terms import RewardSet, TermSpec

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


def ask(reward: IsolatedReward, *levels: int) -> list[float]:
    return reward.score(images(*levels), [f"p{level}" for level in levels], [{"level": level} for level in levels])


MEAN = "return images.mean((1, 2, 3))"


def test_scores_come_back_in_order_and_everything_arrives(make: Make) -> None:
    assert ask(make(MEAN), 3, 1, 2) == [3.0, 1.0, 2.0]
    reward = make("return [len(p) + m['level'] * self.number for p, m in zip(prompts, metadata)]", {"number": "10"})
    assert ask(reward, 5, 70) == [2 + 50, 3 + 700]
    assert 5e6 < reward.memory < 1e9


def test_pictures_arrive_as_pil_images_where_the_class_says_nothing(make: Make) -> None:
    reward = make("return [image.size[0] + image.getpixel((0, 0))[1] for image in images]", start="R.input = 'pil'")
    assert ask(reward, 1, 2) == [7.0, 8.0]


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
    assert ask(reward, 5, 66, 4, 9, 8) == [5.0, 4.0, 4.0, 9.0, 8.0]
    warnings = reward.warnings()
    assert "failed on a picture of the prompt 'p66'" in warnings[-1]
    assert "worst score of its batch" in warnings[-1]
    assert reward.warnings() == []


def test_a_reward_that_always_fails_ends_the_run_soon(make: Make, tmp_path: Path) -> None:
    reward = make(
        "with open(self.mark, 'a') as f: f.write('.')\nraise RuntimeError('no model')", {"mark": str(tmp_path / "mark")}
    )
    with pytest.raises(TexforceError, match=r"reward 'r' failed on a picture of the prompt 'p\d'.*no model"):
        ask(reward, *range(16))
    assert len((tmp_path / "mark").read_text()) < 12
    with pytest.raises(TexforceError, match="no model"):
        ask(reward, 1)


def test_a_wrong_count_breaks_the_contract_and_is_named(make: Make) -> None:
    with pytest.raises(TexforceError, match="reward 'r' returned 1 values for 2 images"):
        ask(make("return [1.0]"), 1, 2)


def test_numbers_that_are_not_finite_arrive_as_they_are(make: Make) -> None:
    found = ask(make("return [float('nan'), float('inf')]"), 1, 2)
    assert np.isnan(found[0]) and found[1] == np.inf


def test_a_slow_start_is_waited_for_and_one_that_never_ends_is_not(make: Make) -> None:
    assert ask(make(MEAN, start="time.sleep(1.5)", timeout=1.0), 1) == [1.0]
    begun = time.monotonic()
    with pytest.raises(TexforceError, match=r"did not answer within 0.5 seconds, 3 times in a row"):
        make(MEAN, start="time.sleep(60)", start_timeout=0.5)
    assert time.monotonic() - begun < 20


def test_a_worker_that_ends_while_it_starts_is_named(make: Make) -> None:
    with pytest.raises(TexforceError, match=r"ended with exit code 5, 3 times in a row"):
        make(MEAN, start="os._exit(5)")
    with pytest.raises(TexforceError, match=r"could not start: ImportError: no such thing"):
        make(MEAN, start="raise ImportError('no such thing')")
    with pytest.raises(TexforceError, match=r"it has no option 'nmber'; its options: mark, number"):
        make(MEAN, {"nmber": "2"})
    with pytest.raises(TexforceError, match=r"'two' is no value for its option 'number'; give a int"):
        make(MEAN, {"number": "two"})


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_memory_that_grows_without_bounds_ends_in_an_error(make: Make) -> None:
    reward = make("if images.max() > 9: bytearray(3_000_000_000)\n" + MEAN, memory_gb=2.0)
    assert ask(reward, 1, 10) == [1.0, 1.0]
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
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent by five seconds")


def test_the_time_out_holds_when_the_reward_has_children(make: Make) -> None:
    reward = make("if os.fork() == 0: time.sleep(30)\ntime.sleep(30)", timeout=0.5)
    begun = time.monotonic()
    with pytest.raises(TexforceError, match=r"within 0.5 seconds"):
        ask(reward, 1)
    assert time.monotonic() - begun < 10


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


def test_where_less_is_better_the_picture_that_fails_gets_the_highest_score(make: Make) -> None:
    one = make("if (images == 66).any(): os._exit(9)\n" + MEAN)._workers[0]
    registry = Registry({("r", ""): RewardInfo("r", one._start["factory"], "x", "1", higher_is_better=False)})
    rewards = RewardSet([TermSpec("r")], registry, hosts={"r": [one.place]})
    try:
        assert rewards.score(images(5, 66, 4), ["a"] * 3, [{}] * 3)["r"].tolist() == [5.0, 5.0, 4.0]
    finally:
        rewards.close()


def test_in_batches_of_one_picture_the_worst_so_far_is_given_and_three_in_a_row_end_it(make: Make) -> None:
    reward = make("if images.max() > 60: raise ValueError('no')\n" + MEAN)
    assert [ask(reward, level)[0] for level in (5, 3, 66, 9, 67)] == [5.0, 3.0, 3.0, 9.0, 3.0]
    ask(reward, 68)
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

    reward = make(MEAN)
    (pid,) = reward.pids
    for _ in range(500):
        ask(reward, 1, 2)
    before = [measure(p) for measure in (descriptors, resident) for p in (pid, "self")]
    for _ in range(10_000):
        ask(reward, 1, 2)
    after = [measure(p) for measure in (descriptors, resident) for p in (pid, "self")]
    assert reward.pids == [pid]
    assert after[:2] == before[:2]
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
