"""The tokenizer: byte-level BPE in the form of CLIP's, in which every word of the world is one token."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from texforce_cli.tiny.words import COLOURS, NOUNS, NUMBERS, PLACES, plural

LENGTH = 32
_START, _END = "<|startoftext|>", "<|endoftext|>"
_OTHERS = (
    "a an the and of in on at with is to one two three four five photo picture image drawing painting complete face "
    "colored small big cute"
).split()


def text_options(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """What the configuration of a CLIP text model takes from its tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def words() -> list[str]:
    """Every word that captions use, and a few more."""
    phrases = [*NOUNS, *map(plural, NOUNS), *COLOURS, *PLACES, *NUMBERS.values(), *_OTHERS]
    return sorted({word for phrase in phrases for word in phrase.split()})


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn the merges, write vocabulary and merges in CLIP's order to `folder`, and load it with transformers."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Lowercase()
    pieces = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    last = [letter + "</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=50,
        initial_alphabet=alphabet,
        # ties between merges go by the letters' numbers, which the trainer would give in the order of a table that is another each time
        special_tokens=last,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([word for word in words() for _ in range(200)], trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *last, *dict.fromkeys(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, _START, _END]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n", encoding="utf-8"
    )
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": _START,
        "eos_token": _END,
        "pad_token": _END,
        "unk_token": _END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    split = [word for word in words() if len(tokenizer(word).input_ids) != 3]
    if split:
        raise SystemExit(f"the tokenizer splits {', '.join(split)}; its training data need more of them")
    return tokenizer
