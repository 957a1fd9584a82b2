"""What it costs processes to meet: each says nothing and hears the others, through a launcher's store.

python -m benchmarks.meetings --out FILE.json

The processes and the server of their store are all on this machine. `store` is the processor time of the server.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from torch.distributed import PrefixStore, TCPStore

from benchmarks.train_speed import cpu_model
from texforce_cli.files import write_json
from texforce_cli.team.processes import Processes
from texforce_cli.team.store import Pieces
from texforce_cli.workflows.run_folder import versions

_HERE = "127.0.0.1"


def member(
    port: int, rank: int, size: int, meetings: int, begun: SimpleQueue[float], ended: SimpleQueue[float]
) -> None:
    """One of the processes; the first says when they begin and when they are done."""
    store = TCPStore(_HERE, port, None, False, wait_for_workers=False)
    place = Processes(Pieces(PrefixStore("words", store)), lambda: None, rank, size)
    for number in range(meetings + 10):
        if number == 10 and not rank:  # they are all there, and warm
            begun.put(time.perf_counter())
        place.each(None)
    if not rank:
        ended.put(time.perf_counter())
    place.part()
    place.close()


def measured(size: int, meetings: int) -> dict[str, float]:
    """Milliseconds of a meeting, and of the processor for the store."""
    context = multiprocessing.get_context("forkserver")  # what it has loaded, no process loads again
    context.set_forkserver_preload(["benchmarks.meetings"])
    begun, ended = context.SimpleQueue(), context.SimpleQueue()
    store = TCPStore(_HERE, 0, None, True, wait_for_workers=False)
    processes = [
        context.Process(target=member, args=(store.port, rank, size, meetings, begun, ended)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    start, own = begun.get(), time.process_time()
    seconds, computed = ended.get() - start, time.process_time() - own
    for process in processes:
        process.join()
    return {"processes": size, "ms": 1000 * seconds / meetings, "store_ms": 1000 * computed / meetings}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--processes", default="2,8,32,64")
    p.add_argument("--meetings", type=int, default=200)
    p.add_argument("--out", type=Path, help="JSON file for everything that was measured")
    a = p.parse_args(argv)
    print(f"{'processes':>9}{'ms a meeting':>14}{'store':>8}")
    rows = [measured(size, a.meetings) for size in map(int, a.processes.split(","))]
    for row in rows:
        print(f"{row['processes']:>9}{row['ms']:>14.2f}{row['store_ms']:>8.2f}")
    if a.out:
        write_json(a.out, {"benchmark": "meetings", "cpu": cpu_model(), "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
