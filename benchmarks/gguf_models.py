"""Models whose widths 256 divides, made of ones whose widths it does not: the same function with channels of zeros.

K-quants and IQ types have blocks of 256 weights; where a width is no multiple, every tool falls back to other types,
which says nothing of them. Channels, units of the feed-forward part and attention heads of zeros are added, and since
an RMS norm then divides by the mean over more channels, its gain and epsilon are scaled by what that changes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MULTIPLE = 256
VOCABULARY = 128


def padded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model of the same function, float32, whose widths 256 divides."""
    old = model.config
    heads = _heads(old)
    width, hidden = _up(old.hidden_size), _up(old.intermediate_size)
    ratio = width / old.hidden_size
    config = LlamaConfig(
        **{
            **old.to_dict(),
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": heads * old.num_key_value_heads // old.num_attention_heads,
            "rms_norm_eps": old.rms_norm_eps / ratio,
            "dtype": "float32",
        }
    )
    new = LlamaForCausalLM(config).eval()
    source = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            parameter.zero_()
            value = source[name].float()
            parameter[tuple(slice(size) for size in value.shape)] = value * (ratio**-0.5 if "norm" in name else 1)
    return new


def _heads(config: LlamaConfig) -> int:
    """The number of heads whose outputs together are a multiple of 256 wide, with whole groups that share a key."""
    sharing = config.num_attention_heads // config.num_key_value_heads
    heads = config.num_attention_heads
    while heads * config.head_dim % MULTIPLE or heads % sharing:
        heads += 1
    return heads


def _up(size: int) -> int:
    """The next multiple of 256."""
    return -(-size // MULTIPLE) * MULTIPLE


def difference(one: LlamaForCausalLM, other: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """The largest difference of two models' logits over ids [sequences, tokens], as a part of the largest logit."""
    with torch.no_grad():
        logits = [model.float()(input_ids=ids).logits for model in (one, other)]
    shared = min(each.shape[-1] for each in logits)
    first, second = (each[..., :shared] for each in logits)
    return ((first - second).abs().max() / first.abs().max()).item()


def with_bytes(source: Path, pieces: list[str], out: Path) -> None:
    """A Llama whose tokens are single characters, with a tokenizer that llama.cpp has, too: one of bytes.

    pieces: the characters by id, "\\u2581" for a space. Rows of zeros are added for a merge, which such a tokenizer has
    to have, and up to 128; they are tokens of no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
        model.get_input_embeddings().weight[len(pieces) :] = 0
    names = [piece.replace("\u2581", "\u0120") for piece in pieces] + ["~~"]
    names = [_as_bytes(name) if not name.startswith("<") or len(name) == 1 else name for name in names]
    names += [f"<unused{number}>" for number in range(VOCABULARY - len(names))]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("~", "~")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    model.save_pretrained(out)
    fast.save_pretrained(out)


def _as_bytes(name: str) -> str:
    """A character as a byte-level tokenizer spells its bytes; those of ASCII, and the space, stay."""
    from tokenizers import pre_tokenizers

    if name.isascii() or name == "\u0120":
        return name
    return "".join(part for part, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(name))


def written_by(model: LlamaForCausalLM, tokens: int, seed: int, pieces: list[str]) -> str:
    """Text of about so many tokens that a model of single characters writes at temperature 1, story after story.

    Only characters of one byte: others are no single tokens of the tokenizer above.
    """
    torch.manual_seed(seed)
    length = model.config.max_position_embeddings - 1
    banned = [number for number, piece in enumerate(pieces) if number < 3 or not (piece.isascii() or piece == "\u2581")]
    banned += range(len(pieces), VOCABULARY)
    texts, count = [], 0
    while count < tokens:
        start = torch.full((32, 1), model.config.bos_token_id)
        made = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, temperature=1.0,
            max_new_tokens=length, min_new_tokens=length, bad_words_ids=[[number] for number in banned],
        )  # fmt: skip
        texts += ["".join(pieces[number] for number in row[1:].tolist()).replace("\u2581", " ") for row in made]
        count += made.numel()
    return " ".join(texts)


def save(model: LlamaForCausalLM, tokenizer: Path, out: Path) -> None:
    """A folder of a model with the tokenizer of another."""
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tokenizer / name).exists():
            (out / name).write_bytes((tokenizer / name).read_bytes())
    json.loads((out / "config.json").read_text())


def write_bytes_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes with three special tokens, of which a random model has rows; llama.cpp wants a merge."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
