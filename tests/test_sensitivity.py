"""What an error of each linear costs: equal to one backward pass through the whole model, additive, kept on disk."""

from __future__ import annotations

import pytest
import torch
from conftest import folder_hashes

import outlierq as public
from outlierq.calibrate.stored.stats_file import StatsReader
from outlierq.core.errors import StatsError
from outlierq.core.measured.sensitivity import LinearSensitivity, Sensitivity
from outlierq.load import open_checkpoint, study
from outlierq.pipeline.block.stats_run import token_set
from outlierq.recipe import Calibration

SMALL = {"samples": 3, "sequence_length": 32}


@pytest.fixture(scope="module")
def stats(untied_llama, tmp_path_factory):
    """Statistics of the float32 model with sensitivities. Read-only."""
    folder = tmp_path_factory.mktemp("stats") / "stats"
    public.calibrate(untied_llama, out=folder, **SMALL, sensitivity=True, device="cpu")
    return folder


def by_autograd(folder) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Sums of squared gradients by every linear's output, and those weighed inputs, through the whole model at once."""
    from transformers import AutoModelForCausalLM

    ids = token_set(study(open_checkpoint(str(folder))), Calibration(**SMALL)).ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, [args[0], out]))
    sums: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    for sequence in ids.split(1):
        states = model.model.embed_tokens(sequence).requires_grad_()
        scores = model(inputs_embeds=states).logits[0].log_softmax(-1)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        one_hot = torch.nn.functional.one_hot(sequence, model.config.vocab_size).float()
        seen["model.embed_tokens"] = [one_hot, states]
        gradients = torch.autograd.grad(scores.gather(1, drawn).sum(), [out for _, out in seen.values()])
        for (name, (read, _)), gradient in zip(seen.items(), gradients, strict=True):
            if name == "model.embed_tokens":
                gradient, read = (read[0].T @ gradient[0])[None], torch.eye(read.shape[-1])[None]
            squares = gradient[0].square()
            outputs, inputs = squares.sum(0).double(), (squares.mean(1) @ read[0].square()).double()
            apart = (squares.sum(1) * read[0].square().sum(1)).sum()
            alike = torch.stack([(gradient[0].T @ read[0]).square().sum(), apart]).double()
            before = sums.get(name, (0.0, 0.0, 0.0))
            sums[name] = (before[0] + outputs, before[1] + inputs, before[2] + alike)
    return sums


def test_block_by_block_gives_what_one_backward_pass_gives(untied_llama, stats):
    measured, expected = StatsReader(stats).sensitivity(), by_autograd(untied_llama)
    assert measured.tokens == 3 * 32 and measured.linears.keys() == expected.keys() and len(expected) == 21 + 2
    for name, (outputs, inputs, alike) in expected.items():
        torch.testing.assert_close(measured.linears[name].outputs, outputs, rtol=2e-3, atol=1e-9)
        torch.testing.assert_close(measured.linears[name].inputs, inputs, rtol=2e-3, atol=1e-9)
        if ".layers." in name:
            torch.testing.assert_close(measured.linears[name].alike, alike, rtol=5e-3, atol=1e-9)


def test_finished_statistics_get_it_and_are_then_those_that_were_made_with_it(untied_llama, stats, tmp_path):
    folder = tmp_path / "later"
    public.calibrate(untied_llama, out=folder, **SMALL, device="cpu")
    assert StatsReader(folder).sensitivity() is None
    public.calibrate(untied_llama, out=folder, **SMALL, sensitivity=True, device="cpu")
    assert folder_hashes(folder) == folder_hashes(stats)
    assert not [path.name for path in folder.iterdir() if "hidden" in path.name or "part" in path.name]


def test_it_is_additive_and_comes_back_from_tensors():
    def one(seed: int) -> Sensitivity:
        draw = torch.Generator().manual_seed(seed)
        parts = (torch.rand(3, generator=draw, dtype=torch.float64) for _ in range(2))
        return Sensitivity(
            5, {f"only.{seed}": LinearSensitivity(torch.ones(2), torch.ones(4)), "a.b": LinearSensitivity(*parts)}
        )

    first, second = one(1), one(2)
    both = first.merge(second)
    assert both.tokens == 10 and list(both.linears) == ["a.b", "only.1", "only.2"]
    torch.testing.assert_close(
        both.linears["a.b"].outputs, first.linears["a.b"].outputs + second.linears["a.b"].outputs
    )
    assert both.linears["a.b"].alike is None and both.linears["a.b"].coherence == 1.0
    known = LinearSensitivity(torch.ones(2), torch.ones(4), torch.tensor([3.0, 2.0]))
    assert Sensitivity.from_tensors(Sensitivity(1, {"a": known + known}).tensors()).linears["a"].coherence == 1.5
    again = Sensitivity.from_tensors(both.tensors())
    assert again.tokens == 10 and again.tensors().keys() == both.tensors().keys()


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a/outputs": torch.ones(2), "a/inputs": torch.ones(2)},
        {"tokens": torch.tensor(3), "a/outputs": torch.ones(2)},
        {"tokens": torch.tensor(3), "a/outputs": torch.ones(2, 2), "a/inputs": torch.ones(2)},
        {"tokens": torch.tensor(3), "a/outputs": torch.ones(2), "a/others": torch.ones(2)},
    ],
)
def test_what_is_no_sensitivity_is_refused(tensors):
    with pytest.raises(StatsError):
        Sensitivity.from_tensors(tensors)


def test_experts_have_it_as_far_as_tokens_reach_them_and_get_one_scheme_a_block(tools, tmp_path):
    from test_moe import STARVED, write_mixture

    model = write_mixture(tmp_path / "mixture", "Qwen3Moe", tools)
    public.calibrate(model, out=tmp_path / "stats", **SMALL, sensitivity=True, device="cpu")
    linears = StatsReader(tmp_path / "stats").sensitivity().linears
    experts = {name.split(".experts.")[1].split(".")[0] for name in linears if ".experts." in name}
    assert len(experts) > 4 and str(STARVED) not in experts, "no token reaches that one"
    numbers = {"numbers": ["int4", "int8"], "client": "vllm", "device": "cpu"}
    fitted = public.fit(model, stats=tmp_path / "stats", bits=5.5, **numbers)
    assert fitted.in_nats and fitted.loss > 0
    by_block: dict[int, set[str]] = {}
    for site in fitted.plan.structure.sites:
        if site.expert:
            by_block.setdefault(site.block, set()).add(str(fitted.plan.schemes.get(site)))
    assert by_block and all(len(schemes) == 1 for schemes in by_block.values())
