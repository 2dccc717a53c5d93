"""The table of embeddings and the output head in `fit`: their loss is predicted, and they are part of the choice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import outlierq as public
from outlierq.core.scheme import gguf_scheme
from outlierq.load import open_checkpoint, study
from outlierq.pipeline.block.stats_run import token_set
from outlierq.pipeline.fitting.space import predicted, space_of
from outlierq.recipe import Calibration, given
from outlierq.registry import method

ON_CPU = {"device": "cpu"}
TEXT = {"samples": 24, "sequence_length": 64}


@pytest.fixture(scope="module")
def untied(tools, tmp_path_factory) -> Path:
    """A head of its own, in float32, so that nothing but rounding is seen. Read-only."""
    folder = tmp_path_factory.mktemp("models") / "untied"
    return tools.write_llama(folder, dtype="float32", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def stats(untied, tiny_llama, tmp_path_factory) -> dict[str, Path]:
    """Statistics with sensitivities of both models, by name. Read-only."""
    folder = tmp_path_factory.mktemp("stats")
    for name, model in (("untied", untied), ("tied", tiny_llama)):
        public.calibrate(model, out=folder / name, sensitivity=True, **TEXT, **ON_CPU)
    return {name: folder / name for name in ("untied", "tied")}


def tables_of(model: Path, stats: Path, client: str) -> dict[str, dict[str, float]]:
    """What each type of each table is predicted to lose, by module."""
    space = space_of(open_checkpoint(str(model)), given("gptq-w4"), client, (), stats)
    losses = predicted(space, stats).losses
    pairs = zip(space.layers, losses, strict=True)
    return {layer.name: {str(s): loss for s, loss in known.items()} for layer, known in pairs if layer.is_table}


def measured_kl(folder: Path, module: str) -> float:
    """Nats per token of the calibration text, of the model with one matrix rounded to Q4_0 as outside of blocks."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = token_set(study(open_checkpoint(str(folder))), Calibration(**TEXT)).ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = model(ids).logits.log_softmax(-1)
    weight = model.get_submodule(module).weight
    weight.data = (
        method("quantize", "rtn").function(weight.data, None, gguf_scheme("Q4_0"), scale_search="mse").dequantize()
    )
    return (
        torch.nn.functional.kl_div(model(ids).logits.log_softmax(-1), before, reduction="none", log_target=True)
        .sum(-1)
        .mean()
        .item()
    )


@torch.no_grad()
@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_what_a_table_loses_is_what_was_predicted(untied, stats, module):
    known = tables_of(untied, stats["untied"], "llama.cpp")
    assert known.keys() == {"lm_head", "model.embed_tokens"}
    assert known[module]["Q4_0 (4.5 bits)"] == pytest.approx(measured_kl(untied, module), rel=0.4)


def test_one_tensor_for_both_loses_more_than_each(tiny_llama, stats):
    [(name, losses)] = tables_of(tiny_llama, stats["tied"], "llama.cpp").items()
    assert name == "model.embed_tokens" and losses["None"] == 0 < losses["Q8_0 (8.5 bits)"] < losses["Q4_0 (4.5 bits)"]


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_a_gguf_file_has_tables_in_types_of_their_own_and_the_planned_size(model, untied, tiny_llama, stats, tmp_path):
    source = tiny_llama if model == "tied" else untied
    least = public.frontier(source, stats=stats[model], client="llama.cpp", **ON_CPU)
    size = least.other_bytes + int(1.4 * least.points[0].layers_bytes)
    fitted = public.fit(source, stats=stats[model], size=size, client="llama.cpp", out=tmp_path / "out", **ON_CPU)
    assert fitted.recipe.quantize.embeddings is not None
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name != "outlierq.json")
    assert size - 8000 < written == fitted.plan.output_bytes <= size
    named = [override.match for override in fitted.recipe.quantize.overrides]
    assert any("lm_head" in match for match in named) == (model == "untied")
    assert public.verify(tmp_path / "out" / "model.gguf", source).sound


def test_without_sensitivities_tables_stay_as_they_are(untied, tmp_path):
    public.calibrate(untied, out=tmp_path / "plain", samples=2, sequence_length=32, **ON_CPU)
    assert tables_of(untied, tmp_path / "plain", "llama.cpp") == {}
    fitted = public.fit(untied, stats=tmp_path / "plain", bits=6, client="llama.cpp", **ON_CPU)
    assert fitted.recipe.quantize.embeddings is None and "*lm_head" in fitted.recipe.quantize.ignore


def test_what_the_author_says_of_tables_holds(untied, stats):
    settings = {"export.format": "gguf", "quantize.embeddings": "Q8_0", "quantize.ignore": ["lm_h*"]}
    fitted = public.fit(untied, stats=stats["untied"], bits=6, client="llama.cpp", settings=settings, **ON_CPU)
    assert fitted.recipe.quantize.embeddings == "Q8_0" and fitted.recipe.quantize.ignore == ("lm_h*",)
    assert not [site.module for site in fitted.plan.schemes if site.module == "lm_head"]


def test_a_head_of_its_own_is_part_of_the_choice_where_it_is_packed(untied, stats, tmp_path):
    from transformers import AutoModelForCausalLM

    few = {"numbers": ["int4", "int8"], **ON_CPU}
    for client in ("transformers", "vllm"):
        fitted = public.fit(untied, stats=stats["untied"], bits=5.2, out=tmp_path / client, client=client, **few)
        by_name = {site.module: scheme for site, scheme in fitted.plan.schemes.items()}
        assert by_name["lm_head"].kind == "int" and fitted.recipe.quantize.embeddings is None
        assert fitted.report.output_bytes == fitted.plan.output_bytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "transformers", dtype=torch.float32)
    ids = token_set(study(open_checkpoint(str(untied))), Calibration(**TEXT)).ids[:2]
    before = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)(ids).logits
    assert not torch.equal(model(ids).logits, before)
    torch.testing.assert_close(model(ids).logits, before, rtol=0.2, atol=0.2)
