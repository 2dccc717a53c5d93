"""What a model writes: greedy completions to look at, before and after, and sampled text to calibrate on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from outlierq.core.errors import OutlierqError
from outlierq.evaluate.divergence import evaluating
from outlierq.evaluate.replacing import replaced

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig
    from transformers._typing import GenerativePreTrainedModel

TOGETHER = 32  # sequences that are written at once to calibrate on
# Names in a config of ids that stand for what is not text.
PLACEHOLDERS = r"\w*(image|video|audio|vision|boi|eoi|boa|eoa)\w*_token_(id|index)"


def complete(model: torch.nn.Module, tokenizer: Any, prompt: str, max_new_tokens: int = 32, chat: bool = False) -> str:
    """The most likely continuation of `prompt`, token by token; deterministic.

    chat: wrap `prompt` as a user's turn of the tokenizer's chat template. Returns the new text only.
    """
    import torch

    writer = cast("GenerativePreTrainedModel", model)  # what a causal model of transformers is
    device = next(model.parameters()).device
    ids = _prompt_ids(tokenizer, prompt, chat).to(device)
    # Replaced, not passed: transformers fills a passed config up with the model's own sampling settings, and warns.
    greedy = _greedy(writer, tokenizer, max_new_tokens)
    with torch.inference_mode(), evaluating(model), replaced(model, generation_config=greedy):
        output = writer.generate(ids, attention_mask=torch.ones_like(ids))
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def check_writes(model: torch.nn.Module) -> None:
    """OutlierqError for a model that does not write text token by token: one that fills masks, for example."""
    can = getattr(model, "can_generate", None)
    if can is None or not can():
        raise OutlierqError(
            f"{type(model).__name__} does not write from left to right, so it cannot write its calibration text",
            hint="set calibration.text to mix, or to a file",
        )


def sampled(model: torch.nn.Module, starts: torch.Tensor, new_tokens: int, seed: int, vocabulary: int) -> torch.Tensor:
    """Sequences [n, start + new_tokens] that the model writes behind `starts` [n, start], sampled at temperature 1.

    An end of text is a token like any other: what comes after it is the next text. The same seed and number of threads
    give the same tokens. vocabulary: ids from there on stand for nothing.
    """
    import torch
    from transformers import GenerationConfig

    check_writes(model)
    writer = cast("GenerativePreTrainedModel", model)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        suppress_tokens=_unwritten(model, vocabulary) or None,
    )
    starts = starts.to(next(model.parameters()).device)
    alone = torch.random.fork_rng(devices=[starts.device] if starts.is_cuda else [])
    with alone, torch.inference_mode(), evaluating(model), replaced(model, generation_config=config):
        torch.manual_seed(seed)
        written: torch.Tensor = writer.generate(starts, attention_mask=torch.ones_like(starts)).cpu()
    return written


def _unwritten(model: Any, vocabulary: int) -> list[int]:
    """Ids that are no text: rows that pad the head, and tokens that stand for images and sounds."""
    config = model.config.get_text_config()
    named = {**config.to_dict(), **model.config.to_dict()}
    other = (value for key, value in named.items() if re.fullmatch(PLACEHOLDERS, key) and isinstance(value, int))
    return sorted({*range(vocabulary, config.vocab_size), *(id for id in other if 0 <= id < config.vocab_size)})


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """[1, length] token ids of the prompt."""
    ids: torch.Tensor
    if not chat:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    elif tokenizer.chat_template is None:
        raise OutlierqError("this tokenizer has no chat template", hint="complete a plain prompt instead")
    else:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
    if ids.shape[1] == 0:
        raise OutlierqError("the prompt is empty", hint="give at least one token to continue")
    return ids


def _greedy(writer: GenerativePreTrainedModel, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """A generation config that keeps only the stop tokens of the model's own."""
    from transformers import GenerationConfig

    stop = writer.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if stop is None else stop
    first_stop = stop[0] if isinstance(stop, list) else stop
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first_stop
    return GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=padding
    )
