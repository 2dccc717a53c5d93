"""The state of tuning after every step, kept in the work folder: a run that was stopped goes on to the same bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutputError
from outlierq.core.machine.own_files import write_atomically
from outlierq.export.writer import disk_error
from outlierq.pipeline.ledger.journal import Journal

if TYPE_CHECKING:
    from outlierq.quantize.tune import Changes, TuneState

# Written in turn: while one is replaced, the journal's last line is of the other.
NAMES = ("tune-0.safetensors", "tune-1.safetensors")
FIGURES = ("late_count", "step", "size", "began", "first", "least", "losses")


@dataclass(frozen=True)
class KeptState:
    """The state files beside a journal, which has a line for each step with the digest of its file."""

    work: Path
    journal: Journal

    def keep(self, state: TuneState) -> None:
        """Write the state, then its line."""
        import xxhash
        from safetensors.torch import save

        parts = {"change": state.changes, "best": state.best, "late": state.late}
        parts |= {"mean": {name: adam.mean for name, adam in state.adams.items()}}
        parts |= {"square": {name: adam.square for name, adam in state.adams.items()}}
        tensors = {f"{part}/{name}": each.contiguous() for part, held in parts.items() for name, each in held.items()}
        content = save(tensors, metadata={"state": json.dumps(self._figures(state))})
        path = self.work / NAMES[state.step % 2]
        try:
            write_atomically(path, content)
        except OSError as error:
            raise disk_error(error, path, len(content)) from error
        digest = xxhash.xxh3_128_hexdigest(content)
        figures = {"kl": state.losses[-1], "held_out": state.judged.get(state.step)}
        self.journal.add(
            f"step {state.step}",
            {"xxh3_128": digest, "rows": [], "transforms": [], "notes": [], "figures": figures},
        )

    def _figures(self, state: TuneState) -> dict[str, Any]:
        """All of a state that is no tensor."""
        judged = {"judged": {str(step): loss for step, loss in state.judged.items()}}
        return {name: getattr(state, name) for name in FIGURES} | judged

    def last(self, start: Changes) -> TuneState | None:
        """The state of the last step that is in the journal; None where there is none.

        OutputError when its file is not the one that was written.
        """
        import xxhash
        from safetensors import safe_open
        from safetensors.torch import load

        from outlierq.quantize.tune import TuneState

        if not self.journal.entries:
            return None
        unit, entry = list(self.journal.entries.items())[-1]
        path = self.work / NAMES[int(unit.removeprefix("step ")) % 2]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise disk_error(error, path, 0) from error
        if xxhash.xxh3_128_hexdigest(content) != entry["xxh3_128"]:
            raise OutputError(f"{path} is not what step {unit} left", hint="run again with --restart")
        tensors, state = load(content), TuneState.of(start)
        with safe_open(path, framework="np") as file:
            figures = json.loads(file.metadata()["state"])
        judged = {int(step): loss for step, loss in figures.pop("judged").items()}
        for name, value in [*figures.items(), ("judged", judged)]:
            setattr(state, name, value)
        for name in start:
            state.changes[name], state.best[name] = tensors[f"change/{name}"], tensors[f"best/{name}"]
            state.late[name], adam = tensors[f"late/{name}"], state.adams[name]
            adam.mean, adam.square = tensors[f"mean/{name}"], tensors[f"square/{name}"]
        return state
