"""What two models say to the same prompts, token by token the most likely: the same every time."""

from __future__ import annotations

from dataclasses import dataclass

from outlierq.core.model import Checkpoint
from outlierq.load import load_tokenizer
from outlierq.pipeline.asked.events import Event
from outlierq.pipeline.asked.resources import Resources
from outlierq.pipeline.measuring.models import load_for_evaluation

TOKENS = 48  # of an answer
PROMPTS = (
    "Write one sentence about the sea.",
    "What is the capital of France, and what is it known for?",
    "Explain in one sentence what a hash table is.",
    "A train leaves at 9:40 and arrives at 11:15. How long does the journey take?",
    "Write a Python function that reverses a list.",
    "Name three things that float on water.",
    "Translate to German: the weather is good today.",
    "Give one reason to get up early.",
)


@dataclass(frozen=True)
class Sample:
    """A prompt, and what the original and the compressed model say to it."""

    prompt: str
    before: str
    after: str


def make_samples(source: Checkpoint, written: Checkpoint, count: int, resources: Resources) -> tuple[Sample, ...]:
    """The first `count` prompts, as turns of a chat where the tokenizer has a template; one model is held at a time."""
    prompts = PROMPTS[:count]
    said = [_said(checkpoint, prompts, number, resources) for number, checkpoint in enumerate((source, written))]
    return tuple(Sample(*each) for each in zip(prompts, *said, strict=True))


def _said(checkpoint: Checkpoint, prompts: tuple[str, ...], number: int, resources: Resources) -> list[str]:
    """What one model says. number: of the model, for those who watch."""
    from outlierq.evaluate.generation import complete

    tokenizer = load_tokenizer(checkpoint)
    model = load_for_evaluation(checkpoint, dtype="bfloat16", device=resources.device)
    said = []
    for place, prompt in enumerate(prompts):
        done = number * len(prompts) + place
        resources.listen(Event("samples", done, 2 * len(prompts), checkpoint.source))
        chat = tokenizer.chat_template is not None
        said.append(complete(model, tokenizer, prompt, max_new_tokens=TOKENS, chat=chat).strip())
    return said
