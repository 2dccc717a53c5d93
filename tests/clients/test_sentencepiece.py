"""llama.cpp splits text as transformers does with the SentencePiece tokenizers that we write, and continues it alike.

Of tiny random models: what is compared are token ids, losses token by token, and the continuation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from piece_tokenizers import SPACE, SPECIAL, all_merges, texts, trained, write_pieces

from clients.jobs import NEW_TOKENS, run_job

pytestmark = pytest.mark.clients

SIZES = (600, 2000)
# llama.cpp multiplies in int8: tokens' losses differed by 0.003 to 0.004 nats on average.
TYPICAL = 0.01
KINDS = [(made, size, across, prepared) for made, across in ((trained, False), (all_merges, True)) for size in SIZES
         for prepared in ("prepend", "gemma")]  # fmt: skip


def write(folder: Path, tools, vocabulary, merges, prepared: str, **settings) -> Path:
    """A model with this tokenizer, quantized, as a GGUF file in `folder`; the folder of the model."""
    from outlierq.load import open_checkpoint
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize
    from outlierq.recipe import load

    source = tools.write_llama(folder / "source", vocab_size=len(vocabulary) + 8, max_position_embeddings=1024)
    (source / "chat_template.jinja").unlink(missing_ok=True)
    write_pieces(source, vocabulary, merges, prepared, **settings)
    chosen = load("rtn-w8", ["export.format=gguf", "quantize.group_size=32"])
    quantize(make_plan(open_checkpoint(str(source)), chosen), folder / "out")
    return source


@pytest.mark.parametrize(("made", "size", "across", "prepared"), KINDS)
def test_llama_cpp_splits_and_continues_text_as_the_dequantized_model(made, size, across, prepared, tools, tmp_path):
    import torch
    from transformers import AutoTokenizer

    from outlierq.load import load_model, open_checkpoint

    source = write(tmp_path, tools, *made(size, across), prepared)
    tokenizer, tried = AutoTokenizer.from_pretrained(source), texts()
    expected = [tokenizer(text)["input_ids"] for text in tried]
    windows = [tokenizer(" ".join(tried[-150:]))["input_ids"][:512]]
    prompt = tokenizer("The sea was calm, and 1234 birds slept.")["input_ids"]
    asked = {"folder": str(tmp_path / "out"), "prompt": prompt, "new_tokens": NEW_TOKENS, "windows": windows}
    answer = run_job("llama.cpp", {**asked, "texts": tried, "options": {}}, tmp_path)
    assert len(tried) > 400 and len(windows[0]) == 512
    assert [text for text, one, two in zip(tried, answer["ids"], expected, strict=True) if one != two] == []
    model = load_model(open_checkpoint(str(tmp_path / "out" / "model.gguf")), dtype="float32")
    with torch.inference_mode():
        ids = torch.tensor(windows)
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none").numpy()
        continued = torch.tensor([prompt + answer["tokens"]])
        logits = model(continued).logits[0, len(prompt) - 1 : -1]
    difference = np.abs(np.array(answer["losses"][0]) - losses)
    regret = logits.amax(1) - logits.gather(1, torch.tensor(answer["tokens"])[:, None])[:, 0]
    assert difference.mean() < TYPICAL and regret.max() < 2 * np.quantile(difference, 0.99)  # of two logits


def test_where_the_plan_says_so_llama_cpp_adds_a_space_and_only_there(tools, tmp_path):
    from transformers import AutoTokenizer

    source = write(tmp_path, tools, *all_merges(2000), "prepend", tokenizer_class="LlamaTokenizer")
    tokenizer, tried = AutoTokenizer.from_pretrained(source), texts()
    asked = {"folder": str(tmp_path / "out"), "prompt": [1, 5], "new_tokens": 1, "windows": [], "texts": tried}
    answer = run_job("llama.cpp", {**asked, "options": {}}, tmp_path)
    differing = [text for text, ids in zip(tried, answer["ids"], strict=True) if ids != tokenizer(text)["input_ids"]]
    assert differing and len(differing) < len(tried) / 2
    assert all(
        text.startswith((" ", SPACE)) or any(token in text for token in (*SPECIAL, "<tool>")) for text in differing
    )
