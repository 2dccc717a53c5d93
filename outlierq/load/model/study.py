"""From headers to a studied model: the class that transformers makes of the config, its structure, its names."""

from __future__ import annotations

from outlierq.core.model import Checkpoint, StudiedModel
from outlierq.load.model.names import checkpoint_names
from outlierq.load.model.skeleton import build_skeleton, find_structure


def study(checkpoint: Checkpoint) -> StudiedModel:
    """The model of a checkpoint, without a weight read. SourceError when its parts do not fit together."""
    own = checkpoint.studied()
    if own is not None:
        return own
    skeleton = build_skeleton(checkpoint)
    structure = find_structure(checkpoint, skeleton)
    return StudiedModel(checkpoint, skeleton, structure, checkpoint_names(checkpoint, skeleton))
