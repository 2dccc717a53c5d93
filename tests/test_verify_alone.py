"""`verify` without the source and without a report: what contradicts itself is found, what is merely unusual is not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.pipeline.checking.alone.gains import check_gains
from outlierq.pipeline.checking.alone.prompts import check_prompts
from outlierq.pipeline.checking.alone.reach import Reach
from outlierq.pipeline.checking.alone.settings import check_settings
from outlierq.pipeline.checking.alone.shards import check_shards
from outlierq.pipeline.checking.alone.sizes import Sizes
from outlierq.pipeline.checking.alone.superblocks import check_superblocks
from outlierq.pipeline.checking.alone.vocabulary import check_vocabulary
from outlierq.pipeline.checking.alone.zero_points import ZeroPoints
from outlierq.pipeline.checking.finding import Findings
from outlierq.pipeline.verify import verify

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import plant_faults

FOUND = {
    "compressed-tensors": (
        "weights.strategy channel", "weights.type float", "weights.actorder group", "codes of zero", "scales x4",
        "a row of scales x2", "two columns of words exchanged", "norm x2", "one gain of a norm negative", "bias x100",
        "head of zeros", "embedding x1000", "eps 1e-2", "another eos", "generation: another eos",
        "generation: temperature 5", "vocabulary reversed", "no tokenizer", "tokenizer without a pre-tokenizer",
        "another chat template", "another bos", "a chat template beside that of the source",
        "an index beside the only file",
    ),
    "compressed-tensors-asymmetric": ("two rows of codes exchanged", "zero points of zero"),
    "gptq": ("sym False", "desc_act True", "g_idx in reverse", "g_idx of zeros"),
    "gptq-asymmetric": ("zero points of zero",),
    "fp8-dynamic": ("weights.type int", "weights.strategy tensor", "inputs static"),
    "fp8-block": ("scales negative", "one scale 0", "one scale x256"),
    "nvfp4": ("weights.group_size 32", "global scale x4", "global scale inverted"),
    "llm-int8": ("one scale x256", "a row of scales 0"),
    "int8-split": ("outlier weights of zero", "codes of zero"),
    "w8a8-static": ("input scale x100", "input scales exchanged", "inputs of 4 bits"),
    "kv-fp8": ("v_scale x1000", "cache of 4 bits"),
    "mixture": ("a router of zeros", "a token takes more experts than there are", "an expert's scales x2"),
    "gguf": (
        "the unit of a superblock x256", "the unit of a superblock negative", "the unit of minima x16",
        "the 6-bit scales of a superblock 0", "embedding of zeros", "another eos",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The sources that faults are planted in, in one folder. Read-only."""
    place = tmp_path_factory.mktemp("planted")
    plant_faults.write_source(place / "source")
    plant_faults.write_source(place / "source-of-gguf", biases=False)
    plant_faults.write_mixture(place / "source-of-mixtures")
    return place


@pytest.mark.parametrize("kind", FOUND)
def test_planted_faults_are_found_without_source_and_report_and_the_sound_export_has_none(kind, sources, tmp_path):
    recipe, settings = plant_faults.EXPORTS[kind]
    clean = plant_faults.export(plant_faults.source_of(sources / "source", kind), tmp_path / "clean", recipe, settings)
    (clean / "outlierq.json").unlink()
    assert said(clean) == []
    changes = dict(plant_faults.faults_of(kind))
    missed = []
    for name in FOUND[kind]:
        copy = Path(shutil.copytree(clean, tmp_path / "copy"))
        changes[name](copy)
        missed += [] if said(copy) else [name]
        shutil.rmtree(copy)
    assert missed == []


def said(folder: Path) -> list[str]:
    """What `verify` says of a folder, or of the GGUF file in it."""
    files = list(folder.glob("*.gguf"))
    return [f"{fault.check} | {fault.tensor} | {fault.what}" for fault in verify(str((files or [folder])[0])).faults]


def judged(judge: Callable[[Findings], None]) -> list[str]:
    findings = Findings()
    judge(findings)
    return [f"{fault.tensor} {fault.what}" for fault in findings.faults]


def weights(count: int = 16, *, rows: int = 64, columns: int = 64) -> dict[str, torch.Tensor]:
    """Normal weights [rows, columns] of four roles in `count / 4` blocks."""
    generator = torch.Generator().manual_seed(0)
    names = [f"layers.{i}.{role}.weight" for i in range(count // 4) for role in ("up", "down", "key", "value")]
    return {name: torch.randn(rows, columns, generator=generator) for name in names}


def sized(tensors: dict[str, torch.Tensor]) -> list[str]:
    sizes = Sizes()
    for name, tensor in tensors.items():
        sizes.add(name, tensor)
    return judged(lambda findings: sizes.judge(tensors, findings))


def test_a_linear_and_a_row_of_another_size_than_all_their_kin_are_told():
    plain, whole, row = weights(), weights(), weights()
    whole["layers.2.up.weight"] *= 4
    row["layers.2.up.weight"][7] *= 4
    assert sized(plain) == []
    assert any(text.startswith("layers.2.up") for text in sized(whole))
    assert any("first row 7" in text for text in sized(row))


def test_sizes_are_not_judged_where_others_stray_too_nor_by_single_weights():
    trained, spikes, zeros = weights(), weights(), weights()
    for number, name in enumerate(trained):
        trained[name] *= 1.5**number  # every tensor differs, every linear has a row that does
        trained[name][3] *= 6
    trained["layers.2.up.weight"][7] *= 20
    for name in spikes:
        spikes[name][5, 5] = 300.0
    zeros["layers.1.up.weight"][9] = 0.0
    assert sized(trained) == [] and sized(spikes) == [] and sized(zeros) == []


def quantized(weight: torch.Tensor, *, symmetric: bool = True) -> QuantTensor:
    """4-bit codes in groups of 16, to the nearest."""
    grouped = weight.view(len(weight), -1, 16)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scheme = QuantScheme(4, 16, symmetric, "float32")
    if symmetric:
        scale = torch.maximum(-low, high) / 7
        return QuantTensor((grouped / scale[..., None]).round().to(torch.int8).view_as(weight), scale, None, scheme)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    codes = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    return QuantTensor(codes.to(torch.uint8).view_as(weight), scale, zero.to(torch.uint8), scheme)


def test_codes_that_stay_below_the_end_of_their_range_are_told_where_all_others_reach_it():
    reach = Reach()
    for number, (name, weight) in enumerate(weights().items()):
        one = quantized(weight)
        if number == 8:
            one.codes[:] = one.codes[:, torch.randperm(64, generator=torch.Generator().manual_seed(1))]
        if number == 9:
            one.codes[:, :16] = 0  # groups of one value may have any code
        reach.add(name, one, Findings())
    assert [text.split()[0] for text in judged(reach.judge)] == ["layers.2.up.weight"]


def test_one_code_everywhere_is_told_unless_all_weights_are_alike():
    lost, constant = quantized(torch.randn(8, 64)), quantized(torch.full((8, 64), 0.5))
    lost.codes.fill_(-8)
    assert "every code is -8" in judged(lambda findings: Reach().add("x", lost, findings))[0]
    assert judged(lambda findings: Reach().add("x", constant, findings)) == []


def test_zero_points_of_other_rows_and_of_one_value_are_told():
    sound, moved, alike = ZeroPoints(), ZeroPoints(), ZeroPoints()
    findings = Findings()
    for number, (name, weight) in enumerate(weights(columns=256, rows=128).items()):
        one = quantized(weight, symmetric=False)
        sound.add(name, one, findings)
        if number == 3:
            assert one.zero_point is not None
            one.zero_point[5] = 15 - one.zero_point[5]
            one.zero_point[5] = one.zero_point[5].flip(0)
            one.zero_point[5, ::2] = 2
        moved.add(name, one, findings)
    assert judged(sound.judge) == [] and findings.faults == []
    assert "row" in judged(moved.judge)[0]
    one = quantized(torch.randn(16, 256), symmetric=False)
    assert one.zero_point is not None
    lost = quantized(torch.randn(128, 64), symmetric=False)
    lost.codes.fill_(0)
    assert judged(lambda found: sound.add("lost", lost, found)) == judged(sound.judge) == []
    one.zero_point.fill_(0)
    assert "every zero point is 0" in judged(lambda found: alike.add("x", one, found))[0]


def test_units_of_superblocks_bind_their_scales():
    scheme = QuantScheme(4, 32, symmetric=False, scale_dtype="float16", scales="two-level")
    scale, minimum = (torch.randint(20, 60, (32, 8), dtype=torch.uint8) for _ in range(2))
    scale[:, 3] = minimum[:, 5] = 63
    units = torch.full((32, 1, 2), 0.01, dtype=torch.float16)
    codes = torch.randint(0, 16, (32, 256), dtype=torch.uint8)

    def told(units: torch.Tensor, scale: torch.Tensor) -> list[str]:
        return judged(
            lambda f: check_superblocks("x", QuantTensor(codes, scale, minimum, scheme, super_scale=units), f)
        )

    negative, lonely, empty = units.clone(), units.clone(), scale.clone()
    negative[4, 0, 1], lonely[4, 0, 0], empty[4] = -0.01, 2.0, 0
    assert told(units, scale) == []
    assert "negative" in told(negative, scale)[0]
    assert "next largest" in told(lonely, scale)[0]
    assert "row 4 block 0" in told(units, empty)[0]


def test_a_single_large_negative_gain_is_told_and_many_or_small_ones_are_not():
    def told(gains: torch.Tensor) -> list[str]:
        norm = SimpleNamespace()
        plain = SimpleNamespace(tensors={"norm.weight": SimpleNamespace(shape=(1000,))}, read=lambda name: gains)
        skeleton = SimpleNamespace(get_submodule=lambda name: norm)
        return judged(lambda found: check_gains(plain, skeleton, {"norm.weight": "norm.weight"}, found))

    one, small, many = torch.ones(1000), torch.ones(1000), torch.ones(1000)
    one[3], small[3], many[::3] = -1.0, -0.1, -1.0
    assert "1 gains are negative" in told(one)[0]
    assert told(small) == [] and told(many) == []


class Files:
    """A checkpoint that has files and a config, and nothing else."""

    kind = "huggingface"

    def __init__(self, config: dict | None = None, **files: object):
        self.config = config or {}
        self.tensors = {"a": SimpleNamespace(nbytes=100)}
        texts = {name.replace("__", "."): text for name, text in files.items()}
        self.files = [
            SimpleNamespace(
                name=name, read=lambda text=text: (text if isinstance(text, str) else json.dumps(text)).encode()
            )
            for name, text in texts.items()
        ]


@pytest.mark.parametrize(
    ("config", "is_known"),
    [
        ({"rms_norm_eps": 1e-6, "rope_theta": 1e6}, True),
        ({"rms_norm_eps": 0.5}, False),
        ({"text_config": {"layer_norm_eps": 0.0}}, False),
        ({"rope_parameters": {"rope_theta": 1.0}}, False),
    ],
)
def test_numbers_that_no_model_has_are_told(config, is_known):
    assert bool(judged(lambda found: check_settings(Files(config), found))) is not is_known


def test_an_index_names_what_is_there(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "one.safetensors").touch()

    def told(content: object) -> str:
        index.write_text(json.dumps(content))
        return " ".join(judged(lambda found: check_shards(tmp_path, Files(), found)))

    assert told({"metadata": {"total_size": 100}, "weight_map": {"a": "one.safetensors"}}) == ""
    assert "files that are not there: two" in told({"weight_map": {"a": "two.safetensors"}})
    assert "1 tensors that are not stored: b" in told({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}})
    assert "leaves out 1 stored" in told({"weight_map": {}})
    assert "tells of 7 bytes" in told({"metadata": {"total_size": 7}, "weight_map": {"a": "one.safetensors"}})
    assert "no index" in told([])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", ""),
        ("{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}", ""),
        ("{% for m in messages %}", "cannot be read"),
        ("hello", "leaves out the messages"),
        ("{{ messages }}", "as Python shows them"),
    ],
)
def test_a_template_that_is_none_is_told_wherever_it_is_kept(text, what):
    for files in (
        {"chat_template__jinja": text},
        {"chat_template__json": {"chat_template": text}},
        {"tokenizer_config__json": {"chat_template": text}},
        {"tokenizer_config__json": {"chat_template": [{"name": "default", "template": text}]}},
    ):
        told = judged(lambda found, files=files: check_prompts(Files(**files), found))
        assert what in " ".join(told) and bool(told) is bool(what)


def tokenizer(**changes: object) -> dict:
    """A tokenizer.json of bytes with two special tokens."""
    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}
    added = [{"id": i, "content": token, "special": True} for token, i in list(vocab.items())[:2]]
    level = {"type": "ByteLevel"}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]}
    return {"model": model, "added_tokens": added, "pre_tokenizer": level, "decoder": level, **changes}


def test_a_tokenizer_that_contradicts_itself_or_the_configs_is_told():
    def told(config: dict | None = None, names: dict | None = None, **changes: object) -> str:
        names = names or {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
        files = Files(config, tokenizer__json=tokenizer(**changes), tokenizer_config__json=names)
        return " ".join(judged(lambda found: check_vocabulary(files, found)))

    assert told({"bos_token_id": 0, "eos_token_id": [1]}) == ""
    assert "eos_token_id is 2, which is the token 'a' of ordinary text" in told({"eos_token_id": 2})
    assert "its bos_token is 'a', ordinary text" in told({"bos_token_id": 0}, {"bos_token": "a", "eos_token": "</s>"})
    assert "nothing turns bytes into letters" in told(pre_tokenizer=None)
    assert "does not turn them back" in told(decoder=None)
    assert "another id in the vocabulary: <s>" in told(added_tokens=[{"id": 3, "content": "<s>"}])
    twice = {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": [["a", "c"]]}
    assert "1 ids belong to more than one" in told(model=twice) and "make no token" in told(model=twice)
    only_template = Files(chat_template__jinja="{{ messages[0].content }}")
    assert "no tokenizer" in judged(lambda found: check_vocabulary(only_template, found))[0]
