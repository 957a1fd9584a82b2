"""An evaluation whose drawing is shared among processes: those of a launcher, or our own."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

import torch

from texforce_cli.errors import Interrupted, TexforceError
from texforce_cli.files import write_text
from texforce_cli.team import launched
from texforce_cli.workflows.evaluation.draw import draw_share
from texforce_cli.workflows.evaluation.pictures import Item
from texforce_cli.workflows.evaluation.request import EvalRequest, recalled
from texforce_cli.workflows.evaluation.run import EvalResult, evaluate
from texforce_cli.workflows.evaluation.variants import check_variants
from texforce_cli.workflows.events import Listener, Progressed, silent
from texforce_cli.workflows.stopping import StopRequest


def evaluate_in(processes: int, request: EvalRequest, listener: Listener = silent) -> EvalResult:
    """`evaluate`, the drawing shared among processes: those of `accelerate launch`, else `processes` of our own.

    The result is the same whatever their number. Under a launcher the first process scores and reports; the others end when
    they have drawn their part.

    Raises:
        TexforceError: as `evaluate`; one of the processes failed.
    """
    rank, world = launched()
    draws = request.stage in ("all", "images")
    if rank:
        if draws:
            _follow(request, rank, world)
        return EvalResult(request.out, None, None, ())
    if not draws or world == processes == 1:
        return evaluate(request, listener)
    beforehand = functools.partial(_lead if world > 1 else _share, world if world > 1 else processes, listener)
    return evaluate(request, listener, beforehand=beforehand)


def _share(processes: int, listener: Listener, request: EvalRequest, items: Sequence[Item], stop: StopRequest) -> None:
    """Draw in processes of our own; each draws every n-th batch."""
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")
    drawn = [v.name for v in request.variants if not v.images]
    places = [request.out / "pictures" / name / f"{item.name}.png" for name in drawn for item in items]
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(threads,)) as pool:
        futures = [pool.submit(draw_share, request, (index, processes), silent) for index in range(processes)]
        try:
            while wait(futures, timeout=1).not_done:
                stop.check()
                listener(Progressed("drawing", sum(map(Path.exists, places)), len(places)))
            for future in futures:
                future.result()
        except Interrupted:
            for child in multiprocessing.active_children():
                child.terminate()  # it ends after its batch
            raise
        except BrokenProcessPool as error:
            raise TexforceError("a process that drew pictures was killed", "give fewer with --num-processes") from error


def _begin(threads: int) -> None:
    """What each of our own processes does first."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose parent was killed would draw on beside the next evaluation, and then wait for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _follow(request: EvalRequest, rank: int, world: int) -> None:
    """One of a launcher's processes but the first."""
    request = recalled(request)
    check_variants(request.variants, request.baseline)
    mine = _marker(request, rank, world)
    mine.unlink(missing_ok=True)
    draw_share(request, (rank, world), silent)
    write_text(mine, "")


def _lead(world: int, listener: Listener, request: EvalRequest, items: Sequence[Item], stop: StopRequest) -> None:
    """The first of a launcher's processes: draw a part, then wait for the others' parts, which lie in the same folder."""
    draw_share(request, (0, world), listener)
    markers = [_marker(request, rank, world) for rank in range(1, world)]
    while not all(marker.exists() for marker in markers):
        stop.check()
        time.sleep(0.2)
    for marker in markers:
        marker.unlink(missing_ok=True)


def _marker(request: EvalRequest, rank: int, world: int) -> Path:
    """The file that says that a process has drawn its part of this request."""
    asked = json.dumps(asdict(replace(request, out=Path())), sort_keys=True, default=str)
    return request.out / f".drawn-{hashlib.sha256(asked.encode()).hexdigest()[:12]}-{rank}-of-{world}"
