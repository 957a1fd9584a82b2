"""Prompt sets and files."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.prompts import Prompt, PromptSet, fetched, load_prompts, read_prompts
from texforce_cli.prompts.sets import SETS

PHRASES = {
    "color": ("A green colored rabbit", "A green colored cat"),
    "count": ("Four wolves in the forest", "Four birds in the forest"),
    "composition": ("A cat and a dog", "A cat and a cup"),
    "location": ("A dog on the moon", "A lion on the moon"),
}


@pytest.mark.parametrize("name", SETS)
def test_every_set_of_the_embedded_model_has_24_seen_and_8_unseen_prompts(name: str) -> None:
    found = load_prompts(name, "tiny")
    seen, unseen = {p.text for p in found.seen}, {p.text for p in found.unseen}
    assert len(seen) == len(found.seen) >= 24
    assert len(unseen) == len(found.unseen) >= 8
    assert not seen & unseen


@pytest.mark.parametrize("name", sorted(set(SETS) - {"animals"}))
def test_unseen_prompts_combine_words_that_are_seen(name: str) -> None:
    found = load_prompts(name, "tiny")
    words = {word for p in found.seen for word in p.text.split()}
    assert {word for p in found.unseen for word in p.text.split()} <= words | {"an"}


def test_the_animals_held_back_are_not_in_the_training_prompts() -> None:
    for family in ("tiny", "sd"):
        found = load_prompts("animals", family)  # type: ignore[arg-type]
        seen = {p.text.split()[-1] for p in found.seen}
        assert not seen & {p.text.split()[-1] for p in found.unseen}
    assert len(load_prompts("animals", "sd").seen) == 45


@pytest.mark.parametrize("name", PHRASES)
def test_on_stable_diffusion_the_sets_are_the_papers_phrases(name: str) -> None:
    found = load_prompts(name, "sd")
    assert (found.seen[0].text, found.unseen[0].text) == PHRASES[name]


def test_the_embedded_model_reads_its_prompts_within_its_limit_and_knows_each_word() -> None:
    from transformers import CLIPTokenizer

    from texforce_cli.tiny import WEIGHTS

    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    for name in SETS:
        found = load_prompts(name, "tiny")
        for prompt in (*found.seen, *found.unseen):
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt.text).input_ids)[1:-1]
            assert [t.removesuffix("</w>") for t in tokens] == prompt.text.split()


def test_txt_jsonl_and_csv_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog \n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a cat"}\n\n{"prompt": "a dog", "id": 3, "split": "unseen"}\n')
    (tmp_path / "a.csv").write_text("id,prompt,split\n1,a cat,\n2,a dog,unseen\n")
    assert [p.text for p in read_prompts(tmp_path / "a.txt").seen] == ["a cat", "a dog"]
    lines = read_prompts(tmp_path / "a.jsonl")
    assert [p.text for p in lines.seen] == ["a cat"]
    assert lines.unseen == (Prompt("a dog", {"id": 3}),)
    table = read_prompts(tmp_path / "a.csv")
    assert table.seen[0] == Prompt("a cat", {"id": "1"})
    assert table.unseen[0].metadata == {"id": "2"}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"a cat\x00\x01", "is binary"),
        ("a.txt", b"\xff\xfe\x00a", "is not UTF-8 text"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt":', "line 2 of"),
        ("a.jsonl", b"[1]", "is no JSON object"),
        ("a.jsonl", b'{"text": "a"}', "is no text"),
        ("a.jsonl", b'{"prompt": 3}', "is no text"),
        ("a.jsonl", b'{"prompt": "a", "split": "test"}', "has the split 'test'"),
        ("a.jsonl", b'{"prompt": "a", "split": ["unseen"]}', "has the split '\\['unseen'\\]'"),
        ("a.jsonl", b'{"prompt": "a", "split": "unseen"}', "no prompt to train on"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "a ", "split": "unseen"}', "'a' is seen and unseen"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "line 1 of .* holds half a character"),
        ("a.jsonl", b'{"prompt": "a", "note": [{"\\udfff": 1}]}', "line 1 of .* holds half a character"),
        ("a.jsonl", b'{"prompt": "a", "note": 1e400}', "line 1 of"),
        ("a.jsonl", b"[" * 200_000, "line 1 of"),
        ("a.csv", b"text\na cat\n", "has no column 'prompt'"),
        ("a.csv", b"x" * 200_000, "is not a CSV file"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        load_prompts(str(tmp_path / name), "tiny")


def test_prompts_to_measure_with_may_all_be_unseen(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "split": "unseen"}\n')
    found = load_prompts(str(tmp_path / "a.jsonl"), "tiny", to_train=False)
    assert (found.seen, found.unseen) == ((), (Prompt("a"),))


def test_unknown_sets_and_missing_files_are_named() -> None:
    with pytest.raises(UsageError, match="did you mean 'animals'"):
        load_prompts("animal", "tiny")
    with pytest.raises(UsageError, match="there is no file"):
        load_prompts("nowhere/a.txt", "tiny")


@given(
    st.lists(st.text(min_size=1).map(str.strip).filter(bool), min_size=1, max_size=5),
    st.lists(st.text(min_size=1).map(str.strip).filter(bool), max_size=5),
)
def test_a_set_written_as_jsonl_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, a: list[str], b: list[str]
) -> None:
    original = PromptSet("x", "y", tuple(Prompt(t, {"k": i}) for i, t in enumerate(a)), tuple(map(Prompt, b)))
    path = tmp_path_factory.mktemp("prompts") / "a.jsonl"
    path.write_text(original.to_jsonl(), encoding="utf-8", newline="")
    again = read_prompts(path)
    assert (again.seen, again.unseen) == (original.seen, original.unseen)
    assert again.sha256 == original.sha256


FILES = {
    "refl_data.json": json.dumps([{"text": " a b "}] * 9000),
    "hps_v2_all.txt": "a b\nc\n" * 375,
    "hps_v2_all_eval.txt": "d\n" * 50,
    "benchmark-prompts.json": json.dumps([{"id": "1-2", "prompt": "e"}] * 100),
    "PartiPrompts.tsv": "Prompt\tCategory\tChallenge\tNote\n" + 'a "b\tAnimals\tBasic\t\n' * 1632,
    "evaluation_metadata.jsonl": '{"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "two cups"}\n'
    * 553,
    "DrawBench Prompts - Sheet1.csv": "Prompts,Category\r\n" + '"A ""red"" car, parked.",Colors\r\n' * 200,
}
"""What the repositories hold, in their format."""


def git(folder: Path, *arguments: str) -> str:
    """Run git on a repository, as nobody in particular."""
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", folder, *who, *arguments], capture_output=True, check=True, text=True).stdout


def commit(remote: Path, name: str, files: Mapping[str, str]) -> fetched._Source:
    """Put files into the repository of a set; where they are found."""
    source = fetched.FETCHED[name]
    folder = remote / source.repository
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "--quiet")
    git(folder, "config", "uploadpack.allowFilter", "true")
    git(folder, "config", "uploadpack.allowAnySHA1InWant", "true")
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--allow-empty", "--message=files")
    return replace(source, commit=git(folder, "rev-parse", "HEAD").strip())


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of GitHub."""
    for name, source in fetched.FETCHED.items():
        if not source.on_hub:
            files = {file.path: FILES[Path(file.path).name] for file in (*source.seen, *source.unseen)}
            monkeypatch.setitem(fetched.FETCHED, name, commit(tmp_path / "remote", name, files))
    monkeypatch.setenv("TEXFORCE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetched, "_GITHUB", (tmp_path / "remote").as_uri())
    return tmp_path / "remote"


def test_fetched_prompts_are_cached_and_come_from_a_pinned_commit(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {p.text for p in load_prompts("imagereward-train", "sd").seen} == {"a b"}
    found = load_prompts("hpsv2-train-750", "sd")
    assert ([p.text for p in found.seen], [p.text for p in found.unseen]) == (["a b", "c"] * 375, ["d"] * 50)
    assert [p.text for p in load_prompts("hpsv2-test-50", "sd").seen] == ["d"] * 50
    assert load_prompts("imagereward-100", "sd").seen[0] == Prompt("e", {"id": "1-2"})
    assert load_prompts("partiprompts", "sd").seen[9] == Prompt('a "b', {"category": "Animals", "challenge": "Basic"})
    geneval = load_prompts("geneval", "sd")
    assert (
        geneval.seen == (Prompt("two cups", {"category": "counting", "include": [{"class": "cup", "count": 2}]}),) * 553
    )
    assert geneval.source == f"github.com/djghosh13/geneval@{fetched.FETCHED['geneval'].commit}"
    monkeypatch.setattr(fetched, "_GITHUB", (remote / "gone").as_uri())
    assert load_prompts("hpsv2-train-750", "sd") == found  # from the cache
    (cached,) = (tmp_path / "home").rglob("hps_v2_all.txt")
    cached.write_text("a cat\n" * 750)
    with pytest.raises(TexforceError, match=f"'{cached}' was changed after it was fetched; delete it"):
        load_prompts("hpsv2-train-750", "sd")
    cached.unlink()
    monkeypatch.setattr(fetched, "_GITHUB", remote.as_uri())
    assert load_prompts("hpsv2-train-750", "sd") == found  # fetched again


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache that huggingface_hub keeps, empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(hub: Path, name: str, path: str, content: str) -> Path:
    """Put a file of a set into the cache, as huggingface_hub does; the file itself, which git's hash names."""
    source, data = fetched.FETCHED[name], content.encode()
    folder = hub / f"datasets--{source.repository.replace('/', '--')}"
    blob = folder / "blobs" / hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()
    link = folder / "snapshots" / source.commit / path
    for place in (blob, link):
        place.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    link.unlink(missing_ok=True)
    link.symlink_to(blob)
    return blob


def test_a_set_of_the_hub_comes_from_a_pinned_commit_and_a_changed_file_is_refused(hub: Path) -> None:
    (file,) = fetched.FETCHED["drawbench"].seen
    blob = cached(hub, "drawbench", file.path, FILES[file.path])
    found = load_prompts("drawbench", "sd")
    assert found.seen == (Prompt('A "red" car, parked.', {"category": "Colors"}),) * 200
    assert found.source == "huggingface.co/datasets/sayakpaul/drawbench@ad794cba698c253ffdb6d18eff3fc87b004c1135"
    blob.write_text(FILES[file.path].replace("red", "sad"), newline="")
    with pytest.raises(TexforceError, match=f"'{blob}' was changed after it was fetched; delete it"):
        load_prompts("drawbench", "sd")


def test_hpsv2_is_four_styles_each_of_a_known_hash(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fetched.FETCHED["hpsv2"]
    assert [file.metadata["category"] for file in source.seen] == ["anime", "concept-art", "paintings", "photo"]
    for file in source.seen:
        cached(hub, "hpsv2", file.path, json.dumps([f"{file.path} {number}" for number in range(800)]))
    with pytest.raises(TexforceError, match=r"has the SHA-256 \w{64} instead of 6b38a479\w+; delete it"):
        load_prompts("hpsv2", "sd")
    unknown = tuple(replace(file, sha256=None) for file in source.seen)
    monkeypatch.setitem(fetched.FETCHED, "hpsv2", replace(source, seen=unknown))
    found = load_prompts("hpsv2", "sd")
    assert len(found.seen) == 3200
    assert found.seen[2400] == Prompt("benchmark/photo.json 0", {"category": "photo"})


@pytest.mark.parametrize(("offline", "why"), [(True, "HF_HUB_OFFLINE is set"), (False, "could not be fetched")])
def test_without_the_hub_the_sentence_says_what_to_run(
    hub: Path, monkeypatch: pytest.MonkeyPatch, offline: bool, why: str
) -> None:
    from huggingface_hub import errors

    def unreachable(*_: Any, **__: Any) -> None:
        raise errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    if not offline:
        monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(TexforceError, match=why) as caught:
        load_prompts("drawbench", "sd")
    command = "hf download sayakpaul/drawbench 'DrawBench Prompts - Sheet1.csv' --repo-type dataset --revision ad794cba"
    assert command in str(caught.value)


@pytest.mark.parametrize(("content", "sentence"), [("<html>", "holds 1 prompts"), ("a\n" * 700, "holds 700 prompts")])
def test_what_holds_too_few_prompts_is_not_kept(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, sentence: str
) -> None:
    path = fetched.FETCHED["hpsv2-train-750"].seen[0].path
    monkeypatch.setitem(fetched.FETCHED, "hpsv2-train-750", commit(remote, "hpsv2-train-750", {path: content}))
    with pytest.raises(TexforceError, match=sentence):
        load_prompts("hpsv2-train-750", "sd")
    assert not (tmp_path / "home").exists()


def test_what_is_not_of_the_commit_is_not_kept(remote: Path, tmp_path: Path) -> None:
    """A server that answers with another file than the one of the commit that was asked for."""
    repository = remote / fetched.FETCHED["geneval"].repository
    true = git(repository, "rev-parse", "HEAD:prompts/evaluation_metadata.jsonl").strip()
    stored = repository / ".git" / "objects" / true[:2] / true[2:]
    forged = FILES["evaluation_metadata.jsonl"].replace("two", "six").encode()
    stored.chmod(0o644)
    stored.write_bytes(zlib.compress(b"blob %d\0" % len(forged) + forged))
    assert (
        b"six cups" in subprocess.run(["git", "-C", repository, "cat-file", "blob", true], capture_output=True).stdout
    )
    with pytest.raises(TexforceError, match=rf"'geneval' could not be fetched \(fatal: could not fetch {true}"):
        load_prompts("geneval", "sd")
    assert not (tmp_path / "home").exists()


def test_without_a_network_the_sentence_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXFORCE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "ON")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as huggingface_hub has read it
    with pytest.raises(TexforceError, match=r"not on this machine.*refl_data.json"):
        load_prompts("imagereward-train", "sd")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetched, "_GITHUB", "https://someone:password@127.0.0.1:9")
    with pytest.raises(TexforceError, match="could not be fetched") as caught:
        load_prompts("imagereward-train", "sd")
    assert "password" not in caught.value.message
    monkeypatch.setenv("PATH", "")
    with pytest.raises(TexforceError, match="by git, which is not installed"):
        load_prompts("imagereward-train", "sd")
    assert not list(tmp_path.rglob("*.json"))


def test_the_file_that_the_sentence_asks_for_is_found_where_it_says(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TexforceError, match="HF_HUB_OFFLINE") as caught:
        load_prompts("hpsv2-test-50", "sd")
    said = re.search(r"fetch (\S+) where there is a network and save it as '(.+)'", str(caught.value))
    assert said
    assert re.fullmatch(r"\S+/mihirp1998/AlignProp/raw/[0-9a-f]{40}/assets/hps_v2_all_eval.txt", said[1])
    place = Path(said[2])
    place.parent.mkdir(parents=True)
    place.write_text(FILES["hps_v2_all_eval.txt"])
    assert [prompt.text for prompt in load_prompts("hpsv2-test-50", "sd").seen] == ["d"] * 50
