"""`outlierq detect` as a whole: predicted errors against a simulation, planted channels, words, files, bad input."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from outlierq.core.measured.outliers import OutlierReport
from outlierq.core.model import Fold, InputGroup, LinearSite
from outlierq.core.stats import InputStats
from outlierq.detect import output_error, stage, verdict
from outlierq.detect.summary import summarise
from outlierq.load.token_text import token_texts

PLANTED = (5, 23, 60)


def tokens(channels: int = 64, count: int = 256, seed: int = 0) -> torch.Tensor:
    """Inputs that bfloat16 holds exactly, two channels 40 times the others."""
    x = torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))
    x[:, [3, 11]] *= 40
    return x.bfloat16().float()


def stats_of(x: torch.Tensor) -> InputStats:
    """What the predictions need, and no first tokens, so that every row counts once."""
    low, high = x.amin(0), x.amax(0)
    sums = {"sum_sq": x.double().square().sum(0), "sum_abs": x.double().abs().sum(0), "sum_x": x.double().sum(0)}
    return InputStats(len(x), 1, min=low, max=high, hessian=x.T @ x / len(x), rows=x.bfloat16(), **sums)


def int8(values: np.ndarray) -> np.ndarray:
    """Each row rounded to 127 steps of its largest magnitude."""
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    return np.rint(values / step) * step


def simulated(x: torch.Tensor, w: torch.Tensor) -> float:
    """Relative output error of int8 per token and per output channel, in float64."""
    exact = x.double().numpy() @ w.double().numpy().T
    found = int8(x.double().numpy()) @ int8(w.double().numpy()).T
    return float(((found - exact) ** 2).sum() / (exact**2).sum())


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(96, 64, generator=torch.Generator().manual_seed(1)) * 0.05


def test_the_predicted_w8a8_error_is_the_simulated_one(weight):
    x = tokens()
    predicted = output_error.predicted_error(weight, stats_of(x), output_error.W8A8)
    assert predicted == pytest.approx(simulated(x, weight), rel=0.1)


def test_the_predicted_error_after_smoothing_is_that_of_the_smoothed_model(weight):
    x = tokens()
    scale = output_error.smoothquant_scale(weight, stats_of(x), torch.arange(64))
    by_hand = x.abs().amax(0).sqrt() / weight.abs().amax(0).sqrt()
    torch.testing.assert_close(scale, by_hand)
    predicted = output_error.predicted_error(weight, stats_of(x), output_error.W8A8, scale)
    assert predicted == pytest.approx(simulated(x / scale, weight * scale), rel=0.1)
    assert predicted < simulated(x, weight) / 10


def test_channels_of_one_producer_get_one_scale(weight):
    tie = torch.arange(64) // 4
    scale = output_error.smoothquant_scale(weight, stats_of(tokens()), tie)
    assert (scale.view(16, 4) == scale.view(16, 4)[:, :1]).all()


def test_the_predicted_error_of_a_split_is_that_of_the_other_columns(weight):
    x = tokens()
    columns = output_error.split_columns(weight, stats_of(x))
    assert {3, 11} <= set(columns.tolist())
    rest = [c for c in range(64) if c not in columns.tolist()]
    exact = ((x @ weight.T) ** 2).sum().item()
    alone = ((x[:, rest] @ weight[:, rest].T) ** 2).sum().item()
    expected = simulated(x[:, rest], weight[:, rest]) * alone / exact
    assert output_error.split_error(weight, stats_of(x), columns) == pytest.approx(expected, rel=0.1)


def test_a_rotation_spreads_the_planted_channels(weight):
    before = output_error.predicted_error(weight, stats_of(tokens()), output_error.W8A8)
    assert output_error.rotated_error(weight, stats_of(tokens())) < before / 3


def test_the_w4a16_group_is_the_largest_that_fits():
    assert [output_error.w4a16(width).group_size for width in (1536, 576, 96, 100)] == [128, 64, 32, None]


@pytest.fixture(scope="module")
def loud(weight) -> torch.Tensor:
    """The weight of a model whose large channels carry no more than the others: those columns are 40 times smaller."""
    return weight.index_copy(1, torch.tensor([3, 11]), weight[:, [3, 11]] / 40)


def group(fold: Fold | None, note: str = "") -> InputGroup:
    site = LinearSite("model.layers.2.mlp.down_proj", "w", None, 96, 64, 2)
    return InputGroup(site.module, (site,), fold, note)


NORM = Fold("norm", "norm.weight", None, tuple(range(64)))


def measured(weight, stats, fold=NORM, note=""):
    its = group(fold, note)
    return stage.measure_group(2, its, stats, {its.sites[0]: weight})


def test_a_group_says_why_it_is_dangerous_and_what_helps(loud):
    found = measured(loud, stats_of(tokens()))
    assert found.danger == "dangerous"
    assert found.remedy == "smoothquant"
    assert found.role == "mlp.down_proj"
    assert found.outlier_channels == (3, 11)
    assert found.errors["w8a8 smoothquant"] < verdict.ERRORS["w8a8"].watch < found.errors["w8a8"]
    assert f"{found.errors['w8a8']:.2%}" in found.reasons[0] and "smoothquant" in found.reasons[0]
    assert {channel.channel for channel in found.top_channels[:2]} == {3, 11}
    assert found.weights["model.layers.2.mlp.down_proj"]["w8a8"] == found.errors["w8a8"]


def test_block_floats_are_predicted_with_both_operands_and_loud_inputs_named(weight, loud):
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(2))
    calm = measured(weight, stats_of(x))
    assert 0.01 < calm.errors["nvfp4"] < calm.errors["mxfp4"] < 0.05
    assert set(output_error.block_floats(48)) == {"nvfp4"}
    other = replace(measured(loud, stats_of(tokens())), group="model.layers.9.mlp.down_proj")
    other = replace(other, errors={**other.errors, "nvfp4": 3 * calm.errors["nvfp4"]})
    sentence = next(s for s in summarise([calm, calm, other], [], {}, []) if s.startswith("NVFP4"))
    assert "model.layers.9.mlp.down_proj loses more than 2 times the median: `auto-nvfp4` keeps" in sentence
    assert "auto" not in next(s for s in summarise([calm, calm], [], {}, []) if s.startswith("MXFP4"))


def test_calm_inputs_have_no_reasons_and_no_remedy(weight):
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(2))
    found = measured(weight, stats_of(x))
    assert (found.danger, found.reasons, found.remedy) == ("calm", (), "")


def test_a_norm_without_weights_is_named_and_another_remedy_is_found(loud):
    found = measured(loud, stats_of(tokens()), None, "input_layernorm has no weight")
    (entry,) = [entry for entry in found.missing if "smoothquant" in entry]
    assert "input_layernorm has no weight" in entry and "rotation" in entry
    assert found.remedy == "split"


def test_an_input_without_tokens_is_reported_and_its_weights_are_still_measured(weight):
    found = measured(weight, None)
    assert found.danger == "watch"
    assert "no token reached it" in found.reasons[0] and "calibrate on more text" in found.missing[0]
    assert found.weights["model.layers.2.mlp.down_proj"]["alpha"] > 1


def test_statistics_without_rows_say_which_measures_are_missing(weight):
    found = measured(weight, replace(stats_of(tokens()), rows=None))
    (entry,) = [entry for entry in found.missing if "`rows`" in entry]
    for name in ("sigma_rate", "iqr_rate", "hill_alpha", "w8a8"):
        assert name in entry
    assert "calibrate again" in entry
    assert "w4a16" in found.errors and "channel_ratio" in found.measures


def test_nan_in_the_statistics_is_dangerous_and_named(weight):
    stats = stats_of(tokens())
    rows = stats.rows.clone()
    rows[4, 4] = float("nan")
    found = measured(weight, replace(stats, rows=rows))
    assert found.danger == "dangerous"
    assert "NaN" in found.reasons[0]
    assert any("`rows` holds a NaN" in entry for entry in found.missing)


def test_nan_in_a_weight_is_dangerous_and_counted(weight):
    broken = weight.clone()
    broken[0, :3] = float("inf")
    found = measured(broken, stats_of(tokens()))
    assert found.danger == "dangerous"
    assert any("3 of 6144 weights are NaN or Inf" in entry for entry in found.missing)
    assert found.errors == {}


def test_every_figure_of_a_report_is_finite(weight):
    dead = tokens()
    dead[:, :8] = 0
    found = measured(weight, stats_of(dead))
    figures = [
        *found.measures.values(),
        *found.errors.values(),
        *found.weights["model.layers.2.mlp.down_proj"].values(),
    ]
    assert figures and all(map(math.isfinite, figures))
    assert any("log_qsur" in entry and "singular" in entry for entry in found.missing)


def test_only_what_nothing_helps_stays_in_sixteen_bits():
    watch = verdict.ERRORS["w8a8"].watch
    assert verdict.cheapest_remedy({"w8a8": watch / 2, "w8a8 smoothquant": 0.0}) == ""
    assert verdict.cheapest_remedy({"w8a8": 1.0, "w8a8 rotation": watch / 9, "w8a8 split": watch / 2}) == "split"
    assert verdict.cheapest_remedy({"w8a8": 1.0, "w8a8 smoothquant": 0.4, "w8a8 rotation": 0.3}) == "rotation"
    assert verdict.cheapest_remedy({"w8a8": 1.0, "w8a8 smoothquant": 0.9}) == "16 bits"


def test_the_role_of_an_input_has_no_numbers():
    assert stage.role("model.layers.3.mlp.experts.5.up_proj") == "mlp.experts.up_proj"
    assert stage.role("transformer.h.11.attn.c_attn") == "attn.c_attn"


def test_what_could_not_be_measured_is_printed_once_a_reason_with_its_places(weight):
    from outlierq.report.outlier_text import missing_lines, outlier_summary
    from outlierq.report.terminal import make_console

    found = [
        replace(measured(weight, replace(stats_of(tokens()), rows=None)), block=b, group=f"g{b}") for b in range(5)
    ]
    report = OutlierReport("a-model", "f", "some text", 1.0, tuple(found), (), summary=("One finding.",))
    (line,) = [line for line in missing_lines(report) if "`rows`" in line]
    assert line.endswith("[g0, g1, g2 and 2 more]")
    console = make_console()
    with console.capture() as caught:
        console.print(outlier_summary(report))
    text = " ".join(caught.get().split())
    assert "One finding." in text and "mlp.down_proj" in text and "not measured: " in text


@pytest.fixture(scope="module")
def stressed(tiny_llama, tmp_path_factory):
    """The tiny model with three channels of every norm times 64, and the columns that read them divided by 64."""
    import shutil

    folder = tmp_path_factory.mktemp("stress") / "model"
    shutil.copytree(tiny_llama, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensor[list(PLANTED)] *= 64
        elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            tensor[:, list(PLANTED)] /= 64
    save_file(tensors, path, {"format": "pt"})
    return folder


def calibrated(outlierq, model, folder):
    answer = outlierq("calibrate", model, "-o", folder, "--samples", 6, "--sequence-length", 32, "-q")
    assert answer.code == 0, answer.err
    return folder


def test_detect_finds_exactly_the_planted_channels_and_writes_them(outlierq, stressed, tmp_path):
    stats = calibrated(outlierq, stressed, tmp_path / "stats")
    answer = outlierq("detect", stressed, "--stats", stats, "-o", tmp_path / "found", "--json", "-q")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    assert report["outlier_channels"] == list(PLANTED)
    reading = [g for g in report["groups"] if g["role"] in ("self_attn.q_proj", "mlp.gate_proj")]
    assert len(reading) == 4
    assert all(set(PLANTED) <= set(g["outlier_channels"]) for g in reading)
    assert OutlierReport.from_dict(json.loads((tmp_path / "found.json").read_text())).to_dict() == (
        OutlierReport.from_dict(report).to_dict()
    )
    assert "<html" in (tmp_path / "found.html").read_text()


def test_detect_says_in_words_which_inputs_are_dangerous_and_why(outlierq, stressed, tmp_path):
    stats = calibrated(outlierq, stressed, tmp_path / "stats")
    answer = outlierq("detect", stressed, "--stats", stats, "-q")
    text = " ".join(answer.out.split())
    assert answer.code == 0
    assert "Dangerous: self_attn.q_proj in blocks 0-1" in text
    assert "W8A8 would change" in text and "with smoothquant" in text
    assert "Channels 5, 23, 60 of the residual stream stand out in most blocks" in text


def test_the_unstressed_model_has_no_outlier_channels_and_a_folder_gets_both_files(outlierq, tiny_llama, tmp_path):
    stats = calibrated(outlierq, tiny_llama, tmp_path / "stats")
    (tmp_path / "out").mkdir()
    answer = outlierq("detect", tiny_llama, "--stats", stats, "-o", tmp_path / "out", "-q")
    assert answer.code == 0, answer.err
    report = OutlierReport.from_dict(json.loads((tmp_path / "out" / "outliers.json").read_text()))
    assert report.outlier_channels == ()
    assert len(report.groups) == 8 and all(g.errors for g in report.groups)
    assert all("sink_heads" in block.measures for block in report.blocks)
    assert (tmp_path / "out" / "outliers.html").is_file()


def test_without_statistics_a_short_calibration_runs_and_leaves_nothing(outlierq, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("outlierq.pipeline.detect.QUICK", {"samples": 4, "sequence_length": 16})
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    answer = outlierq("detect", tiny_llama, "--json")
    assert answer.code == 0, answer.err
    assert "short calibration" in answer.err
    report = json.loads(answer.out)
    assert "4 x 16 tokens" in report["statistics"] and len(report["blocks"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_another_model_are_refused(outlierq, tiny_llama, stressed, tmp_path):
    stats = calibrated(outlierq, tiny_llama, tmp_path / "stats")
    answer = outlierq("detect", stressed, "--stats", stats)
    assert answer.code == 1
    assert "another model" in answer.err and "outlierq calibrate" in answer.err


def test_a_missing_statistics_folder_says_how_to_make_one(outlierq, tiny_llama, tmp_path):
    answer = outlierq("detect", tiny_llama, "--stats", tmp_path / "nothing")
    assert answer.code == 1
    assert "outlierq calibrate" in answer.err


def test_token_texts_are_those_of_the_tokenizer(tiny_llama):
    from outlierq.load import load_tokenizer, open_checkpoint

    checkpoint = open_checkpoint(str(tiny_llama))
    ids = [1, 36, 150, -1]  # -1: not known
    tokenizer = load_tokenizer(checkpoint)
    assert token_texts(checkpoint, ids) == {token: tokenizer.decode([token]) for token in ids[:3]}
