"""Prompt sets that are fetched once from their authors' repositories at a pinned commit, and cached."""

from __future__ import annotations

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
    """`seen` and `unseen` are paths in a repository at a commit; `read` turns a file into texts."""

    repository: str
    commit: str
    seen: str
    read: Callable[[str], list[str]]
    unseen: str | None = None


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _refl(text: str) -> list[str]:
    return [str(row["text"]).strip() for row in json.loads(text)]


FETCHED: dict[str, _Source] = {
    # the prompts that ReFL was trained with (Apache-2.0)
    "imagereward-train": _Source(
        "THUDM/ImageReward", "1beb4e4de0932acbe7fc090c51208048b6269b58", "data/refl_data.json", _refl
    ),
    # 750 of HPSv2's prompts to train and 50 to test, as AlignProp splits them (MIT)
    "hpsv2-train-750": _Source(
        "mihirp1998/AlignProp",
        "185d154bc1ec25260846a2cb040841377c706d6a",
        "assets/hps_v2_all.txt",
        _lines,
        "assets/hps_v2_all_eval.txt",
    ),
}


def fetch(name: str) -> PromptSet:
    """The set `name`, from the cache or the network.

    Raises:
        TexforceError: it is not cached and cannot be fetched, or is not what was expected.
    """
    source = FETCHED[name]
    seen = _read(name, source, source.seen)
    unseen = _read(name, source, source.unseen) if source.unseen else []
    where = f"github.com/{source.repository}@{source.commit}"
    return PromptSet(name, where, tuple(map(Prompt, seen)), tuple(map(Prompt, unseen)))


def _read(name: str, source: _Source, path: str) -> list[str]:
    cached = user_folder("cache") / "prompts" / source.commit / Path(path).name
    if not cached.is_file():
        write_bytes(cached, _download(name, f"{_RAW}/{source.repository}/{source.commit}/{path}"))
    try:
        texts = source.read(cached.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise TexforceError(f"'{cached}' is damaged", "delete it, and it is fetched again") from error
    if not texts:
        raise TexforceError(f"'{cached}' holds no prompts", "delete it, and it is fetched again")
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
