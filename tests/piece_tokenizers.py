"""SentencePiece-like tokenizers trained on the text that every Python carries, and text to try them on."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

SPACE = "\u2581"
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHAT_TEMPLATE = "{% for m in messages %}<|user|>\n{{ m['content'] }}</s>\n{% endfor %}"
# How spaces are prepared -> (normalizer, pre-tokenizer), as tokenizer.json has them.
PREPARED = {
    "prepend": ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None),  # Llama 2, Mistral
    "gemma": (REPLACE, SPLIT),
    **{
        f"metaspace-{scheme}{'-cut' * cut}": (
            None,
            {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": cut},
        )
        for scheme in ("always", "first", "never")
        for cut in (False, True)
    },
}


@cache
def trained(size: int, across: bool = False) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges. across: pieces may hold spaces, as SentencePiece's do where it is told so."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=not across)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*SPECIAL[:3], *BYTES], show_progress=False)
    lines = [line for name in sorted(topics)[::8] for line in topics[name].split("\n")]
    tokenizer.train_from_iterator([*lines, "año niño über Łódź Привет 你好，世界。 日本語"], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def all_merges(size: int, across: bool = False) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The same with every pair that makes a piece, as files have them that were made from SentencePiece's."""
    from transformers.tokenization_utils_base import generate_merges

    vocabulary, merges = trained(size, across)
    return vocabulary, generate_merges(vocabulary, {left + right: -rank for rank, (left, right) in enumerate(merges)})


def write_pieces(
    folder: Path,
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    prepared: str = "prepend",
    **settings: object,
) -> Path:
    """tokenizer.json and tokenizer_config.json. settings: of the latter."""
    normalizer, splitter = PREPARED[prepared]
    decoders = [{**REPLACE, "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prepared not in ("gemma", "metaspace-never", "metaspace-never-cut"):
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    added = [*((token, True) for token in SPECIAL), ("<tool>", False)]
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    numbers = {**vocabulary, "<|user|>": len(vocabulary), "<tool>": len(vocabulary) + 1}
    content = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": numbers[t], "content": t, **options, "special": special} for t, special in added],
        "normalizer": normalizer,
        "pre_tokenizer": splitter,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocabulary, "merges": [list(merge) for merge in merges],
        },
    }  # fmt: skip
    named = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, "chat_template": CHAT_TEMPLATE, **settings}))
    return folder


def texts() -> list[str]:
    """More than 400: spaces, new lines, scripts, emoji, digits, special tokens, literal bytes, running text, noise."""
    from pydoc_data.topics import topics

    make, text = random.Random(0), "\n".join(topics[name] for name in sorted(topics))
    found = [
        "", " ", "  ", "\n", "\n\n", "\t", " \n ", "a", " a", "  a", "a ", "a  ", "Hello world", " Hello world",
        "  Hello   world  ", "Hello\nworld", "Hello\n\n\nworld", "\nHello", "1234567890", "3.14159", "1,000,000",
        "año niño über naïve Ærøskøbing Łódź", "Привет, мир!", "Ελληνικά", "你好，世界。", "日本語のテキスト",
        "한국어 텍스트", "العربية", "עברית", "हिन्दी", "ไทย", "😀😃", "👩‍👩‍👧‍👦 family", "🇩🇪🇫🇷",
        "é vs e\u0301", "\u00a0nbsp\u2003em", "tab\there", "\r\n crlf \r\n", "a\u200bb", "▁literal▁", "▁▁▁", " ▁ ",
        "\x01\x7f", "\ufeffbom", "ﬁ ligature ①②", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "<0x0A>", "<0xE2>", "[PAD5]", "<s", "s>", "< s >",
        "<unknown>",
    ]  # fmt: skip
    for token in (*SPECIAL, "<tool>"):
        around = ("{}", "{}{}", "{}hello", "{} hello", "hello{}", "hello {}", "hello {} world", " {}", "{} ", "\n{}\n")
        found += [form.replace("{}", token) for form in around]
    found += [f"{' ' * count}x{' ' * count}y" for count in range(1, 25)] + ["\n" * count for count in range(2, 12)]
    for _ in range(120):
        start = make.randrange(len(text) - 300)
        found.append(text[start : start + make.randrange(1, 200)])
    letters = (
        "abcdefghijklmnopqrstuvwxyzABCDEF0123456789   \n\t.,;:!?()[]{}<>/\\_-+*'\"éüñßøłžčあ漢字中文한글ая🎉🙂\u0301"
    )
    words = ("the ", "of", " ", "  ", "self", "__init__", "12", "\n", "é", "漢", "<s>", "</s>", "<tool>")
    found += ["".join(make.choices(letters, k=make.randrange(1, 60))) for _ in range(120)]
    return found + ["".join(make.choices(words, k=make.randrange(1, 20))) for _ in range(60)]
