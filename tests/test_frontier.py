"""`outlierq frontier`: convex, exact in its sizes, the same as `fit` chooses; a page that needs nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import outlierq as public
from outlierq.core.errors import ArgumentError
from outlierq.pipeline.fitting.frontier import Frontier
from outlierq.report.pages.frontier_page import frontier_page

FEW = {"numbers": ["int4", "int8"], "device": "cpu"}


@pytest.fixture(scope="module")
def stats(tiny_llama, tmp_path_factory) -> Path:
    """Statistics of the tiny model with sensitivities. Read-only."""
    folder = tmp_path_factory.mktemp("stats") / "stats"
    public.calibrate(tiny_llama, out=folder, samples=4, sequence_length=32, sensitivity=True, device="cpu")
    return folder


@pytest.fixture(scope="module")
def found(tiny_llama, stats) -> Frontier:
    """The frontier of few schemes. Read-only."""
    return public.frontier(tiny_llama, stats=stats, client="vllm", **FEW)


def test_it_is_convex_and_ends_where_nothing_is_lost(found):
    sizes, losses = ([getattr(point, name) for point in found.points] for name in ("layers_bytes", "loss"))
    gains = [(a - b) / (t - s) for a, b, s, t in zip(losses, losses[1:], sizes, sizes[1:], strict=False)]
    assert len(gains) > 8 and gains == sorted(gains, reverse=True) and min(gains) > 0
    assert losses[-1] == pytest.approx(0, abs=1e-12) and found.schemes(len(found.points) - 1) == [("16 bits", 1.0)]


def test_a_point_says_what_fit_finds_for_its_bits(found, tiny_llama, stats):
    at = len(found.points) // 2
    point = found.points[at]
    fitted = public.fit(tiny_llama, stats=stats, bits=found.bits(point) + 1e-9, client="vllm", **FEW)
    assert fitted.loss == pytest.approx(point.loss, rel=1e-9)
    stored = found.options.stored(found.chosen(at))
    assert [fitted.plan.schemes.get(layer.sites[0]) for layer in found.layers] == list(stored)
    assert abs(point.layers_bytes + found.other_bytes - fitted.plan.output_bytes) < 2000, "but for names in the config"


def test_a_second_time_nothing_is_rounded(found, tiny_llama, stats, monkeypatch):
    from outlierq.pipeline.fitting import foretold

    monkeypatch.setattr(foretold, "_rounding_errors", lambda *_: pytest.fail("it was kept by content"))
    again = public.frontier(tiny_llama, stats=stats, client="vllm", **FEW)
    assert again.to_dict() == found.to_dict()


def test_the_page_holds_the_data_and_loads_nothing_from_anywhere(found):
    page = frontier_page(found, "stats")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert data["points"] == json.loads(json.dumps(found.to_dict()))["points"]
    assert "overrides: []" in data["recipe_text"] and data["client_name"] == "vllm"
    assert not re.search(r"(src|href)=", page) and "default-src 'none'" in page
    hostile = frontier_page(found, "</script><b>stats")
    assert "</script><b>" not in hostile


@pytest.mark.parametrize("ending", ["json", "html"])
def test_the_command_writes_what_the_ending_says(outlierq, tiny_llama, stats, tmp_path, ending):
    out = tmp_path / "new" / f"frontier.{ending}"
    numbers = ("--numbers", "int4", "--numbers", "int8")
    answer = outlierq("frontier", tiny_llama, "--stats", stats, "--client", "vllm", *numbers, "-o", out)
    assert answer.code == 0 and "KL per token in nats" in answer.out, answer.err
    assert out.read_text().startswith("<!doctype html>" if ending == "html" else "{")


def test_another_ending_is_refused_before_work(tiny_llama, tmp_path):
    with pytest.raises(ArgumentError, match=r"ends in neither \.html nor \.json"):
        public.frontier(tiny_llama, stats=tmp_path / "none", out=tmp_path / "frontier.txt")
