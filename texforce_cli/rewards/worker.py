"""The program that runs one reward in an environment of its own, and the frames it speaks (docs/worker-protocol.md).

    python -I worker.py [PARENT_PID]

Standard library only, and alone in its file: it runs with an interpreter that has nothing of texforce installed, also on
another machine. Requests come on stdin and answers leave on what was stdout; whatever the reward prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import queue
import re
import signal
import struct
import sys
import threading
import time
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

PROTOCOL = 1
MAGIC = b"TXF1"
_LENGTHS = struct.Struct(">II")
LARGEST_HEADER = 16 * 2**20
LARGEST_PAYLOAD = 2**30


class FrameError(ValueError):
    """What came is no frame of this protocol."""


def write_frame(stream: BinaryIO, header: Mapping[str, Any], payload: Any = b"") -> None:
    """One frame: magic, two lengths, a JSON object in UTF-8, raw bytes."""
    text = json.dumps(header).encode("utf-8")
    if len(text) > LARGEST_HEADER or len(payload) > LARGEST_PAYLOAD:
        raise FrameError(f"a frame of {len(text)} + {len(payload)} bytes is too large")
    stream.write(MAGIC + _LENGTHS.pack(len(text), len(payload)) + text)
    stream.write(payload)
    stream.flush()


def read_frame(stream: BinaryIO, *, noise: int = 0) -> tuple[dict[str, Any], bytes]:
    """The next frame's header and payload, after at most `noise` other bytes.

    Raises:
        EOFError: the other side is gone.
        FrameError: wrong magic, a length above the limits, or a header that is no JSON object.
    """
    magic = _exactly(stream, len(MAGIC))
    while magic != MAGIC:
        if noise <= 0:
            raise FrameError(f"the other side does not speak this protocol (it said {magic!r})")
        magic, noise = magic[1:] + _exactly(stream, 1), noise - 1
    header_length, payload_length = _LENGTHS.unpack(_exactly(stream, _LENGTHS.size))
    if header_length > LARGEST_HEADER or payload_length > LARGEST_PAYLOAD:
        raise FrameError(f"a frame of {header_length} + {payload_length} bytes is too large")
    try:
        header = json.loads(_exactly(stream, header_length).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FrameError("the header of a frame is no JSON") from error
    if not isinstance(header, dict):
        raise FrameError("the header of a frame is no JSON object")
    return header, _exactly(stream, payload_length)


def _exactly(stream: BinaryIO, count: int) -> bytes:
    parts = []
    while count:
        part = stream.read(min(count, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


# the reward class -----------------------------------------------------------------------------------------------------


def load(factory: str) -> Any:
    """The object that "module:Class" names."""
    module, _, attribute = factory.partition(":")
    return getattr(importlib.import_module(module), attribute)


def parameters(factory: Any) -> dict[str, inspect.Parameter]:
    """The options of a reward class by name."""
    try:
        found = inspect.signature(factory, eval_str=True).parameters
    except TypeError as error:
        if "eval_str" not in str(error):
            raise
        found = inspect.signature(factory).parameters  # before Python 3.10
    return dict(found)


def typed_options(factory: Any, options: Mapping[str, str]) -> dict[str, Any]:
    """`options` as keyword arguments of `factory`, each converted to the type of its annotation.

    Raises:
        ValueError: an option that it does not have, or a value of the wrong type; the sentence says what would do.
    """
    if not options:
        return {}
    known = parameters(factory)
    typed = {}
    for key, text in options.items():
        if key not in known:
            raise ValueError("it has no option '{}'; its options: {}".format(key, ", ".join(known) or "none"))
        kind = _kind(known[key])
        try:
            typed[key] = _convert(text, kind)
        except ValueError as error:
            raise ValueError(f"'{text}' is no value for its option '{key}'; give a {_named(kind)}") from error
    return typed


def _kind(option: inspect.Parameter) -> Any:
    """The type of an option: of `X | None` it is X, and where a text will do, str. What is of no type that is known here
    arrives as text."""
    kind = option.annotation
    if isinstance(kind, str):  # before Python 3.10
        known = {"bool": bool, "int": int, "float": float, "str": str}
        kind = re.sub(r"^(?:typing\.)?Optional\[(.*)\]$", r"\1", kind)
        kinds = [known.get(one, one) for one in kind.split(" | ") if one != "None"]
    elif typing.get_origin(kind) in (typing.Union, getattr(types, "UnionType", typing.Union)):
        kinds = [one for one in typing.get_args(kind) if one is not type(None)]
    else:
        kinds = [kind]
    return str if str in kinds else kinds[0] if len(kinds) == 1 else kind


def _named(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _convert(text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if typing.get_origin(kind) is typing.Literal:
        if text not in typing.get_args(kind):
            raise ValueError(text)
        return text
    return kind(text) if kind in (int, float) else text


def score(reward: Any, images: Any, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
    """What the reward says of a batch, one float an image.

    Raises:
        ValueError: another number of values.
    """
    values = [float(value) for value in reward.score(images, list(prompts), list(metadata))]
    if len(values) != len(prompts):
        raise WrongCount(f"returned {len(values)} values for {len(prompts)} images; it must return one an image")
    return values


class WrongCount(ValueError):
    """A reward that does not return one value an image."""


def describe(error: BaseException) -> str:
    """`ValueError: first line`."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # the error of a third party may fail at that, too
        lines = []
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# the process ----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    """Serve requests until stdin ends; it ends too, in whatever batch it is."""
    reader, writer = _private_pipes()
    if arguments:
        _die_with(int(arguments[0]))
    _outlive_sigterm()
    requests: queue.Queue[tuple[dict[str, Any], bytes]] = queue.Queue()
    threading.Thread(target=_listen, args=(reader, requests), daemon=True).start()
    worker = _Worker()
    while True:
        header, payload = requests.get()
        try:
            answer = worker.answer(header, payload)
            json.dumps(answer)  # what cannot be said is a failure of the reward too
        except BaseException as error:  # the plugin boundary: the other side decides what a failure means
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                error = RuntimeError(f"it tried to end the process ({type(error).__name__})")
            traceback.print_exception(type(error), error, error.__traceback__)
            answer = {"type": "error", "error": describe(error), "wrong_count": isinstance(error, WrongCount)}
        write_frame(writer, {**answer, "id": header.get("id"), "memory": peak_memory(), "protocol": PROTOCOL})
        if header.get("type") == "stop":
            return


class _Worker:
    """One reward, made by the request `start`."""

    def __init__(self) -> None:
        self.reward: Any = None

    def answer(self, header: dict[str, Any], payload: bytes) -> dict[str, Any]:
        kind = header.get("type")
        if kind == "start":
            return self._start(header)
        if kind == "score":
            return self._score(header, payload)
        if kind == "options":
            return {"type": "options", "options": list_options(load(header["factory"]))}
        if kind == "describe":
            return {"type": "described", **registered()}
        if kind == "stop":
            close = getattr(self.reward, "close", None)
            if close is not None:
                close()
            return {"type": "stopped"}
        raise FrameError(f"a request of the type {kind!r} is unknown to protocol {PROTOCOL}")

    def _start(self, header: dict[str, Any]) -> dict[str, Any]:
        if header.get("protocol") != PROTOCOL:
            raise FrameError("protocol {} is wanted, this worker speaks {}".format(header.get("protocol"), PROTOCOL))
        if header.get("memory_limit"):
            _limit_memory(header["memory_limit"])
        factory = load(header["factory"])
        self.reward = factory(**typed_options(factory, header.get("options") or {}))
        return {"type": "ready", "python": sys.version.split()[0], "pid": os.getpid()}

    def _score(self, header: dict[str, Any], payload: bytes) -> dict[str, Any]:
        if self.reward is None:
            raise FrameError("a batch came before the reward was started")
        started = time.perf_counter()
        images = decode(payload, header["shape"], getattr(self.reward, "input", "pil"))
        values = score(self.reward, images, header["prompts"], header["metadata"])
        counts = {str(name): int(number) for name, number in (getattr(self.reward, "counts", None) or {}).items()}
        return {"type": "scores", "scores": values, "counts": counts, "seconds": time.perf_counter() - started}


def decode(payload: bytes, shape: Sequence[int], wanted: str) -> Any:
    """The images of a request as the reward wants them: PIL pictures, or one uint8 array."""
    count, height, width, channels = shape
    size = height * width * channels
    if channels != 3 or min(count, height, width) < 1 or len(payload) != count * size:
        raise FrameError(f"{len(payload)} bytes are no images of the shape {list(shape)}")
    if wanted == "uint8":
        import numpy

        return numpy.frombuffer(payload, dtype=numpy.uint8).reshape(tuple(shape))
    if wanted != "pil":
        raise ValueError(f"it wants the input '{wanted}'; it must be 'pil' or 'uint8'")
    from PIL import Image

    parts = (payload[i * size : (i + 1) * size] for i in range(count))
    return [Image.frombytes("RGB", (width, height), part) for part in parts]


def list_options(factory: Any) -> list[dict[str, str]]:
    """Name, type and default of each option of a reward class."""
    listed = []
    for name, parameter in parameters(factory).items():
        default = "" if parameter.default is parameter.empty else repr(parameter.default)
        listed.append({"name": name, "type": _named(_kind(parameter)), "default": default})
    return listed


def registered() -> dict[str, Any]:
    """What the plugins of this environment register: the arguments of each call of `register`, with its distribution."""
    from importlib import metadata

    points = metadata.entry_points()
    group = points.select(group="texforce") if hasattr(points, "select") else points.get("texforce", ())
    calls: list[dict[str, Any]] = []

    def record(distribution: str) -> Callable[..., None]:
        def register(name: str, factory: str, **about: Any) -> None:
            calls.append({"name": name, "factory": factory, "distribution": distribution, **about})

        return register

    seen: set[tuple[str, str]] = set()
    for point in group:
        distribution = getattr(point, "dist", None)
        origin = distribution.name if distribution else ""  # before Python 3.10
        hook = getattr(point.load(), "texforce_register_rewards", None)
        if hook is not None and (origin, point.value) not in seen:  # one module may have several names
            hook(register=record(origin or point.name))
        seen.add((origin, point.value))
    return {"rewards": calls, "python": sys.version.split()[0]}


def _limit_memory(most: int) -> None:
    """Let this process take at most so many bytes.

    Raises:
        OSError: the system cannot do that: Windows, macOS, or a lower limit of its own.
    """
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (ImportError, ValueError, OSError) as error:
        raise OSError(f"memory cannot be limited on {sys.platform} ({error}): leave out --reward-memory") from error


def peak_memory() -> int:
    """Bytes of memory that this process has had at most; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # getrusage's figure begins with the parent's
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """stdin and stdout for the frames alone: prints of the reward go to stderr, and it reads nothing."""
    reader, writer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # who reads it wants UTF-8; on Windows few letters could be written
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    return reader, writer


def _listen(reader: BinaryIO, requests: queue.Queue[tuple[dict[str, Any], bytes]]) -> None:
    try:
        while True:
            requests.put(read_frame(reader))
    except BaseException:  # whatever it is, without this thread nothing is heard any more
        # mostly the other side is gone: nobody wants the batch under way, nor what the reward has started for it
        if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(0)


def _die_with(parent: int) -> None:
    """On Linux the kernel kills this process with its parent, even while the reward holds the interpreter; what the reward
    has started, of which the kernel knows nothing, is ended by a guard."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            prctl = ctypes.CDLL(None).prctl
            prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
            if os.getpgrp() == os.getpid():
                _start_guard(prctl)
    if sys.platform != "win32" and os.getppid() != parent:  # there a launcher stands between
        os._exit(0)


_PARENT_DEATH_SIGNAL = 1


def _outlive_sigterm() -> None:
    """A scheduler sends SIGTERM to every process of a job; the trainer may have an epoch to finish, and ends this one itself.

    What the reward starts can be ended by it as ever: an exec forgets a handler (it would keep SIG_IGN), a fork is told to.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _start_guard(prctl: Callable[[int, int], int]) -> None:
    """A second process that sleeps until this one has ended, and then ends its whole group, itself among it.

    It is made before there is a thread or anything of the reward.
    """
    worker = os.getpid()
    if os.fork():
        return
    try:
        os.closerange(0, 256)  # the pipes end with the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
        prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGUSR1))
        while os.getppid() == worker:
            signal.sigwait({signal.SIGUSR1})
        os.killpg(0, signal.SIGKILL)
    finally:
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
