"""Greedy text completion, to look at what a model says before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from outlierq.core.errors import OutlierqError
from outlierq.evaluate.divergence import evaluating
from outlierq.evaluate.replacing import replaced

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig
    from transformers._typing import GenerativePreTrainedModel


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
