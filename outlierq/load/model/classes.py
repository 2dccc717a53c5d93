"""Which class of transformers a checkpoint is built as: the one that its config names, or that of its model_type.

Other programs build the named class: with its towers for images and audio, under the module names that they know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    from outlierq.core.model import Checkpoint

# What builds the class of a model_type, in this order; the last knows models that hear, too.
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
SUPPORTED = "decoder language models are compressed, also those inside models that see or hear; encoders are not"


def named_class(checkpoint: Checkpoint) -> type[PreTrainedModel] | None:
    """The class of transformers that the config names first; None when it names none that there is."""
    import transformers

    named = checkpoint.config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def made_class(checkpoint: Checkpoint, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config, weights on the device of the context; SourceError for what is no language model.

    A named class that writes no text (a bare base, a classifier), or is for another model_type, is not built: the class
    that transformers has for the model_type is.
    """
    import transformers

    kind = named_class(checkpoint)
    auto = _auto_class(checkpoint, config)
    own_code = checkpoint.trust_remote_code and hasattr(config, "auto_map")
    if kind is not None and not own_code and isinstance(config, kind.config_class) and kind.can_generate():
        causal = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
        if config.is_encoder_decoder and kind is not causal:
            raise _unsupported(checkpoint, f"{kind.__name__} is an encoder with a decoder")
        return kind._from_config(config, dtype=dtype)
    if auto is None:
        raise _unsupported(checkpoint, "transformers has no decoder language model of this type")
    return auto.from_config(config, dtype=dtype, trust_remote_code=checkpoint.trust_remote_code)


def _auto_class(checkpoint: Checkpoint, config: PreTrainedConfig) -> type[_BaseAutoModelClass] | None:
    """The Auto class that builds a config, by the code that comes with it or by transformers' own tables."""
    import transformers

    autos = [getattr(transformers, name) for name in AUTO_CLASSES]
    own = (getattr(config, "auto_map", None) if checkpoint.trust_remote_code else None) or {}
    usual = next((auto for auto in autos if auto.__name__ in own or type(config) in auto._model_mapping), None)
    # Code that comes with a model may know but one class, with its head (Dream).
    return transformers.AutoModel if usual is None and "AutoModel" in own else usual


def own_classes(config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """The classes by which transformers makes language models of a config; some are those of another model_type."""
    import transformers

    mappings = [getattr(transformers, name)._model_mapping for name in AUTO_CLASSES]
    return [mapping[type(config)] for mapping in mappings if type(config) in mapping]


def _unsupported(checkpoint: Checkpoint, why: str) -> SourceError:
    """The error for a model that is not compressed here."""
    return SourceError(
        f"{checkpoint.source} has model_type {checkpoint.config.get('model_type')!r}, which is not supported: {why}",
        hint=SUPPORTED,
    )
