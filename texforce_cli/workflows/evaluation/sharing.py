"""An evaluation whose drawing is shared among processes: those of a launcher, or our own."""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from texforce_cli.errors import Interrupted, TexforceError
from texforce_cli.team import launched
from texforce_cli.team.processes import Lost, Processes
from texforce_cli.team.start import joined
from texforce_cli.workflows.evaluation.draw import draw_share
from texforce_cli.workflows.evaluation.pictures import Item, picture_path
from texforce_cli.workflows.evaluation.request import EvalRequest, recalled
from texforce_cli.workflows.evaluation.run import EvalResult, evaluate
from texforce_cli.workflows.evaluation.variants import check_variants
from texforce_cli.workflows.events import Event, Listener, Progressed, silent
from texforce_cli.workflows.stopping import StopRequest


def evaluate_in(processes: int, request: EvalRequest, listener: Listener = silent) -> EvalResult:
    """`evaluate`, the drawing shared among processes: those of `accelerate launch`, else `processes` of our own.

    The result is the same whatever their number, to the last bits where each has as many threads of the CPU. Under a launcher the first process scores and reports; the others end when
    they have drawn their part.

    Raises:
        TexforceError: as `evaluate`; one of the processes failed.
    """
    rank, world = launched()
    draws = request.stage in ("all", "images")
    if rank:
        if draws:
            _follow(request)
        return EvalResult(request.out, None, None, ())
    if not draws or world == processes == 1:
        return evaluate(request, listener)
    if world == 1:
        return evaluate(request, listener, beforehand=functools.partial(_share, processes, listener))
    with _among_others() as place:
        return evaluate(request, listener, beforehand=functools.partial(_lead, place, listener))


def _share(processes: int, listener: Listener, request: EvalRequest, items: Sequence[Item], stop: StopRequest) -> None:
    """Draw in processes of our own, which share out the threads of this one; each draws every n-th batch."""
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")
    drawn = [v.name for v in request.variants if not v.images]
    places = [picture_path(request.out, name, item) for name in drawn for item in items]
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


@contextlib.contextmanager
def _among_others() -> Iterator[Processes]:
    """This process's place among those of a launcher, who are told where it fails. Once all are there they wait for each other as
    long as it takes, while rewards are fetched, say; whoever ends or shows no life is named.

    Raises:
        TexforceError: they did not find each other; one of the others failed, ended or hangs.
    """
    with contextlib.closing(joined()) as place:
        try:
            place.be_patient(math.inf)
            yield place
        except Lost as error:
            raise TexforceError(
                error.message, "see its messages; what is drawn is kept: run the command again"
            ) from error
        except BaseException as error:
            place.leave(error)
            raise


def _follow(request: EvalRequest) -> None:
    """One of a launcher's processes but the first."""
    with _among_others() as place:  # who are told of what is wrong with the request, too
        request = recalled(request)
        check_variants(request.variants, request.baseline)
        _take_part(place, request, silent)


def _lead(place: Processes, listener: Listener, request: EvalRequest, items: Sequence[Item], stop: StopRequest) -> None:
    """The first of a launcher's processes."""
    place.heed = stop.heed
    _take_part(place, request, listener)


def _take_part(place: Processes, request: EvalRequest, listener: Listener) -> None:
    """Draw this process's part, looking for the others after each batch, then wait for their parts, which lie in the same
    folder."""

    def attentive(event: Event) -> None:
        place.look()
        listener(event)

    draw_share(request, (place.rank, place.size), attentive)
    place.each(None)
    place.part()
