"""Name -> method, name -> format: each says of itself what a recipe must know, and adding one touches no list."""

from outlierq.registry.declaring import (
    COPIES,
    LARGEST_SCALES,
    OUTLIER_COLUMNS,
    STAGES,
    Method,
    approximation,
    learner,
    permuter,
    pruner,
    quantizer,
    rewriter,
    transform,
    turner,
)
from outlierq.registry.finding import import_folder, method, methods, transform_method, ways_to
from outlierq.registry.outside import code_of, follow, is_reference
from outlierq.registry.storing import (
    Asked,
    FormatLimits,
    code_of_format,
    format_limits,
    formats,
    import_installed_formats,
)

__all__ = [
    "COPIES",
    "LARGEST_SCALES",
    "OUTLIER_COLUMNS",
    "STAGES",
    "Asked",
    "FormatLimits",
    "Method",
    "approximation",
    "code_of",
    "code_of_format",
    "follow",
    "format_limits",
    "formats",
    "import_folder",
    "import_installed_formats",
    "is_reference",
    "learner",
    "method",
    "methods",
    "permuter",
    "pruner",
    "quantizer",
    "rewriter",
    "transform",
    "transform_method",
    "turner",
    "ways_to",
]
