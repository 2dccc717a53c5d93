"""llama.cpp splits text as transformers does, for every way of splitting that has a name in our table."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
from gguf_models import write_model
from piece_tokenizers import texts

from clients.jobs import run_job

pytestmark = pytest.mark.clients

KNOWN = json.loads((resources.files("outlierq") / "data" / "gguf_pretokenizers.json").read_text(encoding="utf-8"))
IGNORING = ("llama-bpe", "tekken")
MORE = [
    "In 2024, 12345 birds.",
    "it's THEY'LL We've",
    "naïve Ünïcode 中文字符 かな",
    "a  b\t\tc\n\n d\r\n",
    "x=foo(bar)[0]+1e-5;",
]


def trained(name: str, ignore_merges: bool, size: int = 700) -> str:
    """The tokenizer.json of a byte-level BPE that splits so, trained on the texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    ways = {
        "ByteLevel": lambda use: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use),
        "Digits": lambda each: pre_tokenizers.Digits(individual_digits=each),
        "Split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
    }
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([ways[kind](setting) for kind, setting in KNOWN[name]])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator([*texts(), *MORE * 3], trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = ignore_merges
    return json.dumps(content)


@pytest.mark.parametrize("name", [*KNOWN, "dbrx"])
def test_llama_cpp_finds_the_tokens_of_transformers(name, tmp_path: Path):
    from tokenizers import Tokenizer

    import outlierq
    from outlierq.export.gguf.header import pre_tokenizer_name

    content = trained("llama-bpe" if name == "dbrx" else name, name in IGNORING)
    assert pre_tokenizer_name(json.loads(content)) == name
    folder, file = write_model(tmp_path / "model", "qwen2", vocab_size=704), tmp_path / "m.gguf"
    (folder / "tokenizer.json").write_text(content)
    outlierq.quantize(str(folder), "dense", out=str(file), settings=["export.format=gguf"])
    asked = {"folder": str(file), "prompt": [3], "new_tokens": 0, "windows": [], "options": {}}
    tried = [*texts(), *MORE]
    found = run_job("llama.cpp", {**asked, "texts": tried}, tmp_path)["ids"]
    tokenizer = Tokenizer.from_str(content)  # transformers has ways of its own for some classes
    expected = [tokenizer.encode(text).ids for text in tried]
    found = [ids if ids == meant else ids[1:] for ids, meant in zip(found, expected, strict=True)]  # a begin of text
    assert len(tried) > 400
    assert [text for text, one, two in zip(tried, found, expected, strict=True) if one != two] == []
