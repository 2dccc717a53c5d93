"""SentencePiece tokenizers in GGUF files: llama.cpp's way of splitting gives the tokens of transformers."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader, TokenType
from libraries import sentencepiece_in_gguf
from piece_tokenizers import BYTES, CHAT_TEMPLATE, SPACE, SPECIAL, all_merges, texts, trained, write_pieces
from reference.llama_pieces import joined, token_ids_of
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from outlierq.core.errors import SourceError
from outlierq.export.gguf.header import gguf_header
from outlierq.export.gguf.piece_model import pieces_of_model
from outlierq.export.gguf.sentencepiece import REPLACE, pieces_of
from outlierq.load import load_tokenizer, open_checkpoint
from outlierq.load.gguf.tokenizer import with_spaces_of
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.recipe import load

SIZE = 900
PADDED = SIZE + 5  # rows of the embedding: two added tokens and three that nothing uses
NO_SPACE = ("gemma", "metaspace-never")
DOUBLED = "llama.cpp puts a space before text that begins with a space"


@pytest.fixture(scope="module")
def plain_model(tools, tmp_path_factory) -> Path:
    """A model without a tokenizer. Read-only."""
    folder = tools.write_llama(tmp_path_factory.mktemp("pieces") / "model", vocab_size=PADDED)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    return folder


@pytest.fixture
def with_tokenizer(plain_model, tmp_path) -> Callable[..., Path]:
    """The model with a tokenizer of `write_pieces`."""

    def make(vocabulary, merges, *words: str, **settings) -> Path:
        folder = Path(shutil.copytree(plain_model, tmp_path / "source", dirs_exist_ok=True))
        return write_pieces(folder, vocabulary, merges, *words, **settings)

    return make


def plan_of(source: Path) -> Plan:
    return make_plan(open_checkpoint(str(source)), load("rtn-w4", ["export.format=gguf", "quantize.group_size=32"]))


def compressed(source: Path, name: str = "out") -> tuple[Path, dict]:
    """The file, and its metadata."""
    plan = plan_of(source)
    quantize(plan, source.parent / name)
    path = source.parent / name / "model.gguf"
    return path, {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def read_json(folder: Path) -> dict:
    return json.loads((folder / "tokenizer.json").read_text())


def changed(folder: Path, change: Callable[[dict], object]) -> Path:
    """The folder after a change of its tokenizer.json."""
    content = read_json(folder)
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@sentencepiece_in_gguf
@pytest.mark.parametrize("prepared", ["prepend", "gemma", "metaspace-never"])
@pytest.mark.parametrize(
    ("made", "across"), [(trained, False), (all_merges, True)], ids=["trained", "all merges, spaces inside"]
)
def test_llama_cpp_finds_the_tokens_of_transformers(made, across, prepared, with_tokenizer):
    source = with_tokenizer(*made(SIZE, across), prepared)
    path, fields = compressed(source)
    assert not [note for note in plan_of(source).notes if "llama.cpp" in note]
    theirs, ours = AutoTokenizer.from_pretrained(source), load_tokenizer(open_checkpoint(str(path)))
    llama_cpp, tried = token_ids_of(fields), texts()
    assert len(set(tried)) > 400
    for text in tried:
        expected = theirs(text)["input_ids"]
        assert llama_cpp(text) == expected, repr(text)
        assert ours(text)["input_ids"] == expected, repr(text)
        assert ours.decode(expected) == theirs.decode(expected)
    assert fields["tokenizer.ggml.add_space_prefix"] is (prepared not in NO_SPACE)
    assert verify(str(path), str(source)).sound


@sentencepiece_in_gguf
def test_the_tokenizer_that_a_dense_copy_carries_on_is_the_same(with_tokenizer, tmp_path):
    path, fields = compressed(with_tokenizer(*trained(SIZE)))
    for file in open_checkpoint(str(path)).files:
        (tmp_path / file.name).write_bytes(file.read())
    carried, llama_cpp = AutoTokenizer.from_pretrained(tmp_path), token_ids_of(fields)
    assert all(carried(text)["input_ids"] == llama_cpp(text) for text in texts())
    assert carried.chat_template == CHAT_TEMPLATE and carried.eos_token == "</s>"


def test_the_metadata_say_what_every_piece_is(with_tokenizer):
    vocabulary, merges = trained(SIZE)
    _, fields = compressed(with_tokenizer(vocabulary, merges))
    tokens, scores, types = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert len(tokens) == len(scores) == len(types) == PADDED == len(set(tokens))
    kinds = {token: TokenType(kind) for token, kind in zip(tokens, types, strict=True)}
    assert kinds["<unk>"] == TokenType.UNKNOWN and kinds["<tool>"] == TokenType.USER_DEFINED
    assert {kinds[token] for token in SPECIAL[1:]} == {TokenType.CONTROL}
    assert {kinds[token] for token in BYTES} == {TokenType.BYTE} and types.count(TokenType.UNUSED) == 3
    made = dict(zip(tokens, scores, strict=True))
    assert [made[left + right] for left, right in merges] == [-rank for rank in range(len(merges))]
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")}
    assert ids == {"bos": 1, "eos": 2, "unknown": 0}
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_eos_token"] is False


@pytest.mark.parametrize(
    ("prepared", "settings"),
    [
        ("metaspace-always", {}),
        ("metaspace-always-cut", {}),
        ("metaspace-first", {}),
        ("prepend", {"tokenizer_class": "LlamaTokenizer"}),  # transformers prepares text in its own way
        ("prepend", {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}),
    ],
)
def test_where_llama_cpp_adds_a_space_the_plan_says_so_and_all_other_text_is_equal(prepared, settings, with_tokenizer):
    source = with_tokenizer(*trained(SIZE), prepared, **settings)
    notes = [note for note in plan_of(source).notes if "llama.cpp" in note]
    assert len(notes) == 1 and notes[0].startswith(DOUBLED)
    _, fields = compressed(source)
    theirs, llama_cpp = AutoTokenizer.from_pretrained(source), token_ids_of(fields)
    found = [(text, llama_cpp(text) == theirs(text)["input_ids"]) for text in texts()]
    differing = [text for text, equal in found if not equal]
    assert differing

    def explained(text: str) -> bool:
        """Some stretch of text between special tokens begins with a space, or, with the longer note, has one before."""
        for token in (*SPECIAL, "<tool>"):
            text = text.replace(token, "\0")
        first, *behind = text.split("\0")
        spaced = (
            [first, *behind]
            if "behind a special" not in notes[0]
            else [first, *(f" {part}" for part in behind if part)]
        )
        return any(part.startswith((" ", SPACE)) for part in spaced)

    assert all(explained(text) for text in differing)
    assert any(not explained(text) for text, _ in found)


def test_for_models_of_mistral_transformers_does_what_the_file_says_and_nothing_is_noted(with_tokenizer):
    source = with_tokenizer(*trained(SIZE), tokenizer_class="LlamaTokenizer")
    config = json.loads((source / "config.json").read_text())
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    (source / "config.json").write_text(json.dumps({**config, **mistral}))
    assert not [note for note in plan_of(source).notes if "llama.cpp" in note]
    theirs, llama_cpp = AutoTokenizer.from_pretrained(source), token_ids_of(compressed(source)[1])
    assert all(llama_cpp(text) == theirs(text)["input_ids"] for text in texts())


def test_no_begin_of_text_is_added_where_the_tokenizer_adds_none(with_tokenizer):
    """llama.cpp adds one unless it is told not to."""
    source = changed(with_tokenizer(*trained(SIZE)), lambda content: content.update(post_processor=None))
    _, fields = compressed(source)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert token_ids_of(fields)("Hello") == AutoTokenizer.from_pretrained(source)("Hello")["input_ids"]


def test_special_tokens_may_be_described_by_objects_as_older_files_do(with_tokenizer):
    named = {
        name: {"content": text} for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    _, fields = compressed(with_tokenizer(*trained(SIZE), **named))
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")] == [0, 1, 2]
    assert fields["tokenizer.ggml.add_bos_token"] is True


def test_a_name_for_which_llama_cpp_changes_special_tokens_is_not_written(with_tokenizer):
    source = with_tokenizer(*trained(SIZE))
    _, fields = compressed(source.rename(source.parent / "My-Phi3-Tiny"))
    assert fields["general.name"] == "My-phi_3-Tiny"


def model_of(merges: list[tuple[str, str]], *others: str) -> dict:
    """A tokenizer.json with just these merges, for single letters and what they make."""
    pieces = dict.fromkeys(["<unk>", *BYTES, *"abcd", *others, *(left + right for left, right in merges)])
    vocabulary = {token: number for number, token in enumerate(pieces)}
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocabulary, "merges": merges}
    return {"model": model, "normalizer": REPLACE, "added_tokens": []}


def splitters(tokenizer: dict) -> tuple[Callable[[str], list[str]], Callable[[str], list[str]], tuple[str, ...]]:
    """How the tokenizers library cuts text, how llama.cpp does, and the differences that are noted."""
    model = {key: tokenizer["model"][key] for key in ("vocab", "merges", "byte_fallback", "unk_token")}
    pieces, theirs = pieces_of(tokenizer, len(model["vocab"]), {}, {}), Tokenizer(models.BPE(**model))
    scores = dict(zip(pieces.tokens, pieces.scores, strict=True))
    return (lambda text: theirs.encode(text).tokens), (lambda text: joined(text, scores)), pieces.differences


def test_a_piece_has_the_rank_of_the_pair_that_really_makes_it():
    """`aab` is listed first as a + ab, but only aa + b ever comes to be, which is later than b + c."""
    tokenizer = model_of([("a", "ab"), ("a", "a"), ("b", "c"), ("aa", "b"), ("a", "b")])
    theirs, ours, _ = splitters(tokenizer)
    assert theirs("aabc") == ours("aabc") == ["aa", "bc"]


def test_random_merges_give_equal_pieces_wherever_no_difference_is_noted(monkeypatch):
    monkeypatch.setattr("outlierq.export.gguf.sentencepiece.MOST_OTHERS", 1.0)
    make, equal, noted = random.Random(0), 0, 0
    for _ in range(150):
        pieces, merges = list("abcd"[: make.randrange(1, 5)]), {}
        for _ in range(make.randrange(1, 14)):
            left, right = make.choice(pieces), make.choice(pieces)
            merges[left, right] = None
            pieces = list(dict.fromkeys([*pieces, (left + right)[:9]]))
            if len(left + right) > 8:
                del merges[left, right]
        ordered = list(merges)
        make.shuffle(ordered)
        theirs, ours, differs = splitters(model_of(ordered))
        tried = ["".join(make.choices("abcd", k=make.randrange(1, 25))) for _ in range(20)]
        assert differs or all(ours(text) == theirs(text) for text in tried)
        equal, noted = equal + (not differs), noted + bool(differs)
    assert equal > 30 and noted > 30


def test_a_piece_that_transformers_never_makes_is_noted_and_many_are_refused():
    vocabulary, merges = trained(SIZE)
    unmade = next(left + right for left in "qxz" for right in "jkv" if left + right not in vocabulary)
    tokenizer = model_of(merges, *vocabulary, unmade)
    theirs, ours, noted = splitters(tokenizer)
    assert noted == (f"{unmade!r}: a piece that llama.cpp makes of text, and transformers never does",)
    assert theirs(unmade) == list(unmade) and ours(unmade) == [unmade]
    tokenizer["model"]["merges"] = merges[: len(merges) // 2]
    with pytest.raises(SourceError, match=r"would join \d+ pieces that transformers never makes"):
        splitters(tokenizer)


def test_what_added_tokens_lose_is_noted(with_tokenizer):
    def change(content: dict) -> None:
        content["added_tokens"][3]["rstrip"] = True
        content["added_tokens"][4]["normalized"] = True
        content["added_tokens"].append(
            {**content["added_tokens"][4], "id": PADDED, "content": "<far>", "normalized": False}
        )

    notes = plan_of(changed(with_tokenizer(*trained(SIZE)), change)).notes
    assert [note for note in notes if "llama.cpp" in note or "left out" in note] == [
        "'<|user|>': in transformers it takes spaces beside it, or must be a word; in llama.cpp not",
        "'<tool>': transformers finds it behind a space only; llama.cpp everywhere",
        "'<far>': without a row in the embedding, left out",
    ]


REFUSED = {
    "NFKC": lambda content: content.update(normalizer={"type": "NFKC"}),
    "Digits": lambda content: content.update(pre_tokenizer={"type": "Digits", "individual_digits": True}),
    "it keeps spaces": lambda content: content.update(normalizer=None),
    "no pieces for 1 of the 256 bytes": lambda content: content["model"]["vocab"].pop("<0x41>"),
    "has ignore_merges True": lambda content: content["model"].update(ignore_merges=True),
    "not all in its vocabulary": lambda content: content["model"]["merges"].append(["q", "\u2603"]),
    "is damaged": lambda content: content["model"]["merges"].append(["q"]),
    "tokenizer.json is not JSON": None,
    "two tokens '\\[PAD904\\]'": lambda content: content["added_tokens"][4].update(content="[PAD904]"),
    "has no name in llama": lambda content: content.update(model={"type": "Unigram", "vocab": [["<unk>", 0.0]]}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_tokenizer_that_llama_cpp_would_change_throughout_is_refused(reason, with_tokenizer):
    source = with_tokenizer(*trained(SIZE))
    if REFUSED[reason] is None:
        (source / "tokenizer.json").write_text("{")
    else:
        changed(source, REFUSED[reason])
    with pytest.raises(SourceError, match=reason):
        plan_of(source)


def field(number: int, value: int | float | bytes | str) -> bytes:
    """A field of a protocol buffer."""

    def varint(rest: int) -> bytes:
        return bytes([rest | 128]) + varint(rest >> 7) if rest > 127 else bytes([rest])

    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


BPE, IDENTITY = field(3, 2), field(4, 0)  # model_type; remove_extra_whitespaces


def model_bytes(vocabulary: dict[str, int], ranks: dict[str, int], trainer: bytes = BPE, normalizer: bytes = IDENTITY):
    """tokenizer.model with these pieces, and <tool> as its user's own."""
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, "<|user|>": 3, "<tool>": 4, **dict.fromkeys(BYTES, 6)}
    pieces = []
    for text in (*vocabulary, "<|user|>", "<tool>"):
        kind = field(3, kinds[text]) if text in kinds else b""
        pieces.append(field(1, text) + field(2, -float(ranks.get(text, len(ranks)))) + kind)
    return b"".join(field(1, piece) for piece in pieces) + field(2, trainer) + field(3, normalizer)


@pytest.fixture
def with_model(with_tokenizer) -> Callable[..., Path]:
    """The model with tokenizer.model alone, of the pieces of `trained`."""

    def make(*parts: bytes) -> Path:
        vocabulary, merges = trained(SIZE)
        source = with_tokenizer(vocabulary, merges)
        (source / "tokenizer.json").unlink()
        ranks = {left + right: rank for rank, (left, right) in enumerate(merges)}
        (source / "tokenizer.model").write_bytes(model_bytes(vocabulary, ranks, *parts))
        return source

    return make


def test_a_source_with_nothing_but_a_sentencepiece_model_is_calibrated(with_model, outlierq, tmp_path):
    source = with_model()
    answer = outlierq("calibrate", source, "-o", tmp_path / "stats", "--samples", "4", "--sequence-length", "32")
    assert answer.code == 0, answer.err


def test_a_sentencepiece_model_gives_the_same_pieces_as_the_tokenizer_made_of_it(with_model, with_tokenizer):
    from_model, noted = compressed(with_model())[1], plan_of(with_model()).notes
    assert [note for note in noted if "SentencePiece" in note] == [
        "'<tool>': llama.cpp puts a space before text behind it, and none before it; SentencePiece not"
    ]
    _, fields = compressed(with_tokenizer(*trained(SIZE)), "from tokenizer.json")
    keys = {f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "add_space_prefix", "add_bos_token")}
    assert {key: from_model[key] for key in keys} == {key: fields[key] for key in keys}
    assert from_model["tokenizer.chat_template"] == CHAT_TEMPLATE
    ids = [from_model[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")]
    assert ids == [0, 1, 2]
    from_json, from_pieces = token_ids_of(fields), token_ids_of(from_model)
    assert all(from_json(text) == from_pieces(text) for text in texts())


def test_a_run_of_spaces_that_the_user_asked_for_is_made_before_all_other_pieces():
    own = [(text, 1) for text in ("a", SPACE, f"{SPACE}a")] + [(SPACE * 2, 4), (SPACE * 3, 4), ("\n", 4)]
    kinds = [("<unk>", 2), *((byte, 6) for byte in BYTES), *own]
    raw = b"".join(field(1, field(1, text) + field(2, 0.0) + field(3, kind)) for text, kind in kinds)
    pieces, _ = pieces_of_model(raw + field(2, BPE) + field(3, IDENTITY), len(kinds), {}, {})
    scores = dict(zip(pieces.tokens, pieces.scores, strict=True))
    assert joined(f"{SPACE * 4}a", scores) == [SPACE * 3, f"{SPACE}a"] and joined("\na", scores) == ["\n", "a"]
    assert pieces.differences == ()


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((b"",), "a unigram model"),
        ((field(3, 4),), "a character model"),
        ((BPE, field(2, b"map")), "maps characters"),
        ((BPE + field(24, 1),), "spaces behind words"),
        ((b"\xff",), "is damaged"),
    ],
)
def test_a_sentencepiece_model_that_llama_cpp_would_use_in_another_way_is_refused(parts, reason, with_model):
    with pytest.raises(SourceError, match=reason):
        plan_of(with_model(*parts))


def test_no_damage_of_a_sentencepiece_model_is_anything_but_a_fault_of_the_source(with_model):
    source, make = with_model(), random.Random(0)
    raw = (source / "tokenizer.model").read_bytes()
    checkpoint = open_checkpoint(str(source))
    refused = 0
    for _ in range(60):
        damaged = bytearray(raw[: make.choice([len(raw), make.randrange(len(raw))])])
        for _ in range(make.randrange(1, 4)):
            damaged[make.randrange(len(damaged))] = make.randrange(256)
        (source / "tokenizer.model").write_bytes(damaged)
        try:
            gguf_header(checkpoint, [("token_embd.weight", "F32", (PADDED, 64), PADDED * 64 * 4)])
        except SourceError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("said", [True, False, None])
def test_a_file_that_does_not_say_whether_a_space_is_put_before_text_means_that_one_is(said, with_tokenizer):
    """As llama.cpp takes it. What transformers made of the file does not matter."""
    fields = {"tokenizer.ggml.model": "llama"} | ({} if said is None else {"tokenizer.ggml.add_space_prefix": said})
    made = AutoTokenizer.from_pretrained(with_tokenizer(*trained(SIZE), "metaspace-first"))
    found = with_spaces_of(made, fields)("<s> a")["input_ids"]
    expected = AutoTokenizer.from_pretrained(with_tokenizer(*trained(SIZE), "gemma" if said is False else "prepend"))
    assert found == expected("<s> a")["input_ids"]
