"""The class that `architectures` of config.json names, built without weights: what other programs will build."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError
from outlierq.load.model.classes import named_class, own_classes
from outlierq.load.model.names import made_names, stored_names, tied_parameters
from outlierq.load.model.skeleton import config_errors, skeleton_config

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint


def declared_class(checkpoint: Checkpoint) -> tuple[torch.nn.Module, dict[str, str]] | None:
    """The model of the class that `architectures` names, parameters on the meta device, and the stored tensor of each.

    None where the config names none, or one that transformers does not have. SourceError when the class is of another
    kind of model, or cannot be built.
    """
    import torch

    from outlierq.core.machine.building import building

    kind = named_class(checkpoint)
    if kind is None:
        return None
    config = skeleton_config(checkpoint)
    if not isinstance(config, kind.config_class) and kind not in own_classes(config):
        raise SourceError(
            f"config.json of {checkpoint.source} names {kind.__name__} in architectures, a class for "
            f"{kind.config_class.__name__}, but its model_type is {config.model_type}"
        )
    try:
        with building(checkpoint.source):
            model = kind._from_config(config, dtype=getattr(torch, checkpoint.dtype))
    except (*config_errors(), ImportError, AssertionError) as error:
        raise SourceError(f"transformers cannot build {kind.__name__}, which config.json names: {error}") from error
    names = made_names(checkpoint.tensors, model) | stored_names(checkpoint.tensors, model)
    for target, source in tied_parameters(checkpoint, model, names).items():
        names[target] = names[source]
    return model, names
