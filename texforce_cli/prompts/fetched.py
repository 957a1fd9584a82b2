"""Prompt sets that are fetched once from their authors' repositories at a pinned commit, and cached."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from texforce_cli.errors import TexforceError, quoted
from texforce_cli.files import from_json, user_folder, write_bytes
from texforce_cli.prompts import Prompt, PromptSet

_GITHUB = "https://github.com"
_GIT = ("git", "-c", "gc.auto=0", "-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=60")
"""A connection over which nothing comes for a minute is given up."""
_GIT_HASH = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class _File:
    """A file of a repository: at least `count` prompts, each with `metadata`; `sha256` where it is known."""

    path: str
    count: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sha256: str | None = None


@dataclass(frozen=True)
class _Source:
    """Files of a GitHub repository, or of a data set on the Hub, at a commit; `read` turns a file's text into prompts."""

    repository: str
    commit: str
    read: Callable[[str], list[Prompt]]
    seen: tuple[_File, ...]
    unseen: tuple[_File, ...] = ()
    on_hub: bool = False

    def __str__(self) -> str:
        return f"{'huggingface.co/datasets' if self.on_hub else 'github.com'}/{self.repository}@{self.commit}"


def _lines(text: str) -> list[Prompt]:
    return [Prompt(line.strip()) for line in text.splitlines() if line.strip()]


def _texts(text: str) -> list[Prompt]:
    return [Prompt(str(row).strip()) for row in from_json(text)]


def _refl(text: str) -> list[Prompt]:
    return [Prompt(str(row["text"]).strip()) for row in from_json(text)]


def _benchmark(text: str) -> list[Prompt]:
    return [Prompt(str(row["prompt"]).strip(), {"id": str(row["id"])}) for row in from_json(text)]


def _parti(text: str) -> list[Prompt]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [Prompt(row["Prompt"].strip(), {"category": row["Category"], "challenge": row["Challenge"]}) for row in rows]


def _drawbench(text: str) -> list[Prompt]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return [Prompt(row["Prompts"].strip(), {"category": row["Category"].strip()}) for row in rows]


def _geneval(text: str) -> list[Prompt]:
    rows = [from_json(line) for line in text.splitlines() if line.strip()]
    return [Prompt(str(row.pop("prompt")).strip(), {"category": str(row.pop("tag")), **row}) for row in rows]


_ALIGNPROP = ("mihirp1998/AlignProp", "185d154bc1ec25260846a2cb040841377c706d6a")
_IMAGEREWARD = ("THUDM/ImageReward", "1beb4e4de0932acbe7fc090c51208048b6269b58")
_HPS_TEST = _File("assets/hps_v2_all_eval.txt", 50)
_HPS_STYLES = {
    "anime": "6b38a479cc6f899866e9b7a8bf91f096b4afc6883b95275a61891327182b14ae",
    "concept-art": "530d057deafcb82c581e9d1be2ffcb98828fe99f0b54257414d2ab8a5cf2b83e",
    "paintings": "6570d39467e08b24b64e5b8a4177b0f61c525631121dc5a91fe2ab956eab4d5f",
    "photo": "92a3c9a0f743f66eb87bd112cdda830d6bdb4c073c86021d53b74001fcb18052",
}


class NotFetched(TexforceError):
    """Prompts that are not on this machine and cannot be fetched now."""


FETCHED: dict[str, _Source] = {
    # the prompts that ReFL was trained with (Apache-2.0)
    "imagereward-train": _Source(*_IMAGEREWARD, _refl, (_File("data/refl_data.json", 9_000),)),
    # 750 of HPSv2's prompts to train and 50 to test, as AlignProp splits them (MIT)
    "hpsv2-train-750": _Source(*_ALIGNPROP, _lines, (_File("assets/hps_v2_all.txt", 750),), (_HPS_TEST,)),
    # those 50 alone, to measure with
    "hpsv2-test-50": _Source(*_ALIGNPROP, _lines, (_HPS_TEST,)),
    # HPSv2's benchmark: 800 prompts of each of four styles (Apache-2.0)
    "hpsv2": _Source(
        "zhwang/HPDv2",
        "b9517430f34b1080d4f741118d2a440155a165cd",
        _texts,
        tuple(_File(f"benchmark/{s}.json", 800, {"category": s}, sha256) for s, sha256 in _HPS_STYLES.items()),
        on_hub=True,
    ),
    # the 100 prompts of ImageReward's benchmark (Apache-2.0)
    "imagereward-100": _Source(*_IMAGEREWARD, _benchmark, (_File("benchmark/benchmark-prompts.json", 100),)),
    # PartiPrompts: 1,632 prompts with categories (Apache-2.0)
    "partiprompts": _Source(
        "google-research/parti",
        "2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071",
        _parti,
        (_File("PartiPrompts.tsv", 1_600),),
    ),
    # DrawBench: the 200 prompts of Imagen's paper in 11 categories
    "drawbench": _Source(
        "sayakpaul/drawbench",
        "ad794cba698c253ffdb6d18eff3fc87b004c1135",
        _drawbench,
        (_File("DrawBench Prompts - Sheet1.csv", 200),),
        on_hub=True,
    ),
    # GenEval: 553 prompts in six tasks, with what a detector should find (MIT)
    "geneval": _Source(
        "djghosh13/geneval",
        "d927da8e42fde2b1b5cd743da4df5ff83c1654ff",
        _geneval,
        (_File("prompts/evaluation_metadata.jsonl", 553),),
    ),
}


def fetch(name: str) -> PromptSet:
    """The set `name`, from the cache or the network.

    Raises:
        NotFetched: it is not cached and cannot be fetched.
        TexforceError: it is not what it should be, or holds fewer prompts.
    """
    source = FETCHED[name]
    read = _from_hub if source.on_hub else _from_github
    seen, unseen = (
        [prompt for file in files for prompt in read(name, source, file)] for files in (source.seen, source.unseen)
    )
    return PromptSet(name, str(source), tuple(seen), tuple(unseen))


def least_count(name: str) -> int:
    """How many prompts the set `name` has at least, also where it was never fetched."""
    return sum(file.count for file in (*FETCHED[name].seen, *FETCHED[name].unseen))


def _from_github(name: str, source: _Source, file: _File) -> list[Prompt]:
    cached = user_folder("cache") / "prompts" / source.commit / Path(file.path).name
    kept = cached.with_name(f"{cached.name}.sha256")
    if cached.is_file():
        data, mend = cached.read_bytes(), "delete it, and it is fetched again"
        if kept.is_file() and kept.read_bytes().strip() != _sha256(data).encode():
            raise TexforceError(f"'{cached}' was changed after it was fetched", mend)
        return _checked(source, file, data, f"'{cached}'", mend)
    data = _from_git(name, source, file, cached)
    prompts = _checked(source, file, data, f"'{file.path}' of {source}", "use another set of prompts")
    write_bytes(cached, data)  # only what is whole is kept
    write_bytes(kept, f"{_sha256(data)}\n".encode())
    return prompts


def _from_hub(name: str, source: _Source, file: _File) -> list[Prompt]:
    from huggingface_hub import constants, hf_hub_download

    remedy = (
        f"run `hf download {source.repository} {quoted(file.path)} --repo-type dataset --revision {source.commit}` "
        "where there is a network, and copy that machine's cache of the Hub"
    )
    try:
        found = hf_hub_download(source.repository, file.path, repo_type="dataset", revision=source.commit)
    except Exception as error:  # the network boundary: whatever it was, the remedy is the same
        why = f"could not be fetched ({type(error).__name__})"
        if constants.is_offline_mode():
            why = "are not on this machine and HF_HUB_OFFLINE is set"
        raise NotFetched(f"the prompts '{name}' {why}", remedy) from error
    cached = Path(found).resolve()
    what, mend, data = f"'{cached}'", "delete it, and it is fetched again", cached.read_bytes()
    # the Hub's cache calls a file by the hash that git has for it
    if cached.parent.name == "blobs" and _GIT_HASH.fullmatch(cached.name) and cached.name != _git_hash(data):
        raise TexforceError(f"{what} was changed after it was fetched", mend)
    return _checked(source, file, data, what, mend)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _checked(source: _Source, file: _File, data: bytes, what: str, remedy: str) -> list[Prompt]:
    if file.sha256 and (found := _sha256(data)) != file.sha256:
        raise TexforceError(f"{what} has the SHA-256 {found} instead of {file.sha256}", remedy)
    try:
        prompts = source.read(data.decode("utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise TexforceError(f"{what} cannot be read as prompts", remedy) from error
    if len(prompts) < file.count:
        raise TexforceError(f"{what} holds {len(prompts)} prompts instead of {file.count} or more", remedy)
    return [replace(prompt, metadata={**prompt.metadata, **file.metadata}) for prompt in prompts]


def _from_git(name: str, source: _Source, file: _File, cached: Path) -> bytes:
    """A file of a commit, and nothing else of it. Its hash is checked by git: a commit's own is made of those of its files.

    Source: https://git-scm.com/docs/partial-clone
    """
    from huggingface_hub import constants

    url = f"{_GITHUB}/{source.repository}"
    remedy = f"fetch {url}/raw/{source.commit}/{file.path} where there is a network and save it as '{cached}'"
    if constants.is_offline_mode():
        raise NotFetched(f"the prompts '{name}' are not on this machine and HF_HUB_OFFLINE is set", remedy)
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    with tempfile.TemporaryDirectory() as folder:

        def git(*arguments: str) -> bytes:
            command = [*_GIT, f"--git-dir={folder}", *arguments]
            return subprocess.run(command, capture_output=True, check=True, env=environment).stdout

        try:
            git("init", "--quiet", "--bare")
            git("remote", "add", "origin", url)
            git("fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", source.commit)
            return git("cat-file", "blob", f"{source.commit}:{file.path}")  # fetches this one
        except OSError as error:
            why = "is not installed" if isinstance(error, FileNotFoundError) else f"cannot be run ({error.strerror})"
            raise NotFetched(f"the prompts '{name}' are fetched by git, which {why}", remedy) from error
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode("utf-8", "replace").strip().splitlines() or [
                f"git: exit code {error.returncode}"
            ]
            raise NotFetched(f"the prompts '{name}' could not be fetched ({said[-1]})", remedy) from error
