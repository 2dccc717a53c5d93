"""A frontier as one HTML file that needs nothing else: one drags a budget and sees what every layer becomes.

It has the frame of all pages (`page.py`), and a script of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

from outlierq.core.errors import ArgumentError
from outlierq.pipeline.asked.request import refuse_unwritable, write_file
from outlierq.pipeline.fitting.frontier import Frontier
from outlierq.report.pages.page import element_json, model_name, part, render

NATS = "Predicted from sensitivities: the sum over all layers of what rounding costs at the end of the model, in nats."
NO_UNIT = (
    "The statistics hold no sensitivities, so losses rank choices and predict no KL divergence; "
    "`outlierq calibrate --sensitivity` adds them."
)


def frontier_page(frontier: Frontier, stats: Path | str) -> str:
    """The HTML text. stats: the folder of statistics, as the command on the page names it."""
    from markupsafe import Markup

    data = frontier.to_dict() | {
        "stats": str(stats),
        "client_name": frontier.client.lower(),
        "recipe_text": frontier.recipe_text,
    }
    return render(
        "frontier_page",
        css=part("frontier_page.css"),
        script="frontier_page.js",
        model=model_name(frontier.model),
        client=frontier.client,
        recipe=frontier.recipe,
        statistics=str(stats),
        lead=NATS if frontier.in_nats else NO_UNIT,
        loss_name="predicted KL per token, nats" if frontier.in_nats else "predicted loss, no unit",
        data=Markup(element_json(data)),
    )


def check_place(out: Path | None) -> None:
    """OutlierqError before any work when a page or JSON cannot be written there."""
    if out is not None and out.suffix not in (".html", ".json"):
        raise ArgumentError(f"{out} ends in neither .html nor .json", argument="out")
    refuse_unwritable(out)


def write_frontier(frontier: Frontier, stats: Path | str, out: Path) -> None:
    """Write the page, or JSON, as the ending of the name says; all of it or nothing."""
    page = out.suffix == ".html"
    text = frontier_page(frontier, stats) if page else json.dumps(frontier.to_dict(), allow_nan=False) + "\n"
    write_file(out, text.encode())
