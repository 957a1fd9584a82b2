"""Prompt sets that are fetched once from their authors' repositories at a pinned commit, and cached."""

from __future__ import annotations

import csv
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from texforce_cli.errors import TexforceError
from texforce_cli.files import user_folder, write_bytes
from texforce_cli.prompts import Prompt, PromptSet

_RAW = "https://raw.githubusercontent.com"
_SECONDS = 60
_LARGEST = 64_000_000


@dataclass(frozen=True)
class _Source:
    """`seen` and `unseen` are paths in a repository at a commit; `read` turns a file into prompts, at least `counts` of them."""

    repository: str
    commit: str
    seen: str
    read: Callable[[str], list[Prompt]]
    counts: tuple[int, int]
    unseen: str | None = None


def _lines(text: str) -> list[Prompt]:
    return [Prompt(line.strip()) for line in text.splitlines() if line.strip()]


def _refl(text: str) -> list[Prompt]:
    return [Prompt(str(row["text"]).strip()) for row in json.loads(text)]


def _benchmark(text: str) -> list[Prompt]:
    return [Prompt(str(row["prompt"]).strip(), {"id": str(row["id"])}) for row in json.loads(text)]


def _parti(text: str) -> list[Prompt]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [Prompt(row["Prompt"].strip(), {"category": row["Category"], "challenge": row["Challenge"]}) for row in rows]


FETCHED: dict[str, _Source] = {
    # the prompts that ReFL was trained with (Apache-2.0)
    "imagereward-train": _Source(
        "THUDM/ImageReward", "1beb4e4de0932acbe7fc090c51208048b6269b58", "data/refl_data.json", _refl, (9_000, 0)
    ),
    # 750 of HPSv2's prompts to train and 50 to test, as AlignProp splits them (MIT)
    "hpsv2-train-750": _Source(
        "mihirp1998/AlignProp",
        "185d154bc1ec25260846a2cb040841377c706d6a",
        "assets/hps_v2_all.txt",
        _lines,
        (750, 50),
        "assets/hps_v2_all_eval.txt",
    ),
    # those 50 alone, to measure with
    "hpsv2-test-50": _Source(
        "mihirp1998/AlignProp",
        "185d154bc1ec25260846a2cb040841377c706d6a",
        "assets/hps_v2_all_eval.txt",
        _lines,
        (50, 0),
    ),
    # the 100 prompts of ImageReward's benchmark (Apache-2.0)
    "imagereward-100": _Source(
        "THUDM/ImageReward",
        "1beb4e4de0932acbe7fc090c51208048b6269b58",
        "benchmark/benchmark-prompts.json",
        _benchmark,
        (100, 0),
    ),
    # PartiPrompts: 1,632 prompts with categories (Apache-2.0)
    "partiprompts": _Source(
        "google-research/parti", "2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071", "PartiPrompts.tsv", _parti, (1_600, 0)
    ),
}


def fetch(name: str) -> PromptSet:
    """The set `name`, from the cache or the network.

    Raises:
        TexforceError: it is not cached and cannot be fetched, or holds fewer prompts than it should.
    """
    source = FETCHED[name]
    seen = _read(name, source, source.seen, source.counts[0])
    unseen = _read(name, source, source.unseen, source.counts[1]) if source.unseen else []
    where = f"github.com/{source.repository}@{source.commit}"
    return PromptSet(name, where, tuple(seen), tuple(unseen))


def _read(name: str, source: _Source, path: str, count: int) -> list[Prompt]:
    cached = user_folder("cache") / "prompts" / source.commit / Path(path).name
    if cached.is_file():
        return _checked(source, cached.read_bytes(), count, f"'{cached}'", "delete it, and it is fetched again")
    url = f"{_RAW}/{source.repository}/{source.commit}/{path}"
    data = _download(name, url)
    texts = _checked(source, data, count, f"what came from {url}", "see whether a proxy stands between")
    write_bytes(cached, data)  # only what is whole is kept
    return texts


def _checked(source: _Source, data: bytes, count: int, what: str, remedy: str) -> list[Prompt]:
    try:
        texts = source.read(data.decode("utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise TexforceError(f"{what} cannot be read as prompts", remedy) from error
    if len(texts) < count:
        raise TexforceError(f"{what} holds {len(texts)} prompts instead of {count} or more", remedy)
    return texts


def _download(name: str, url: str) -> bytes:
    remedy = f"fetch {url} on a machine with a network and use --prompts FILE"
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise TexforceError(f"the prompts '{name}' are not on this machine and HF_HUB_OFFLINE is set", remedy)
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            data: bytes = answer.read(_LARGEST)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise TexforceError(f"the prompts '{name}' could not be fetched ({reason})", remedy) from error
    return data
