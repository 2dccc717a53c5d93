"""A report survives JSON, and a foreign layout is refused."""

import json

import pytest

from outlierq.core.errors import OutlierqError
from outlierq.core.report import Report, SiteRow


@pytest.fixture
def report():
    rows = (
        SiteRow("model.layers.0.mlp.up_proj", "gptq", 4, 128, True, 0.012, 0.09, 4.125, 1.5),
        SiteRow("model.layers.0.mlp.down_proj", "rtn", 8, None, False, None, 0.004, 8.03, 0.1, "fallback"),
    )
    return Report(
        model="tiny",
        recipe="gptq-w4",
        settings={"quantize": {"bits": 4, "group_size": 64}},
        out="tiny-w4",
        fingerprint="ab" * 32,
        versions={"torch": "2.13.0"},
        seeds={"calibration": 0},
        machine={"device": "cpu", "threads": 2},
        rows=rows,
        transforms=({"block": 0, "group": "q_proj", "method": "awq", "fold": "input_layernorm", "note": ""},),
        notes=("down_proj: rounded to nearest",),
        source_bytes=4000,
        output_bytes=1000,
        bits_per_weight=4.2,
        quantized_bits_per_weight=4.125,
        source_bits_per_weight=16.0,
        seconds={"calibrate": 2.0, "quantize": 1.5},
        evaluation={"divergence": {"kl_per_token": 0.01}},
    )


def test_a_report_comes_back_from_json_as_it_was(report):
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert Report.from_dict(json.loads(text)) == report


def test_derived_figures(report):
    assert report.size_ratio == 4.0
    assert report.total_seconds == 3.5


def test_a_foreign_layout_is_refused(report):
    with pytest.raises(OutlierqError, match="layout version 99"):
        Report.from_dict({**report.to_dict(), "report_version": 99})


def test_missing_and_unknown_keys_are_named(report):
    values = report.to_dict()
    values["sedes"] = values.pop("seeds")
    with pytest.raises(OutlierqError, match=r"missing keys \['seeds'\] and unknown keys \['sedes'\]"):
        Report.from_dict(values)
    values = report.to_dict()
    del values["rows"][0]["bits"]
    with pytest.raises(OutlierqError, match=r"row has missing keys \['bits'\]"):
        Report.from_dict(values)
