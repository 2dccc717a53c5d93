"""Name -> method. A method's keyword-only arguments are its recipe schema; adding one touches no file but its own."""

from outlierq.registry.declaring import (
    COPIES,
    LARGEST_SCALES,
    OUTLIER_COLUMNS,
    STAGES,
    Method,
    permuter,
    pruner,
    quantizer,
    rewriter,
    transform,
)
from outlierq.registry.finding import method, methods, transform_method, ways_to
from outlierq.registry.outside import code_of, follow, is_reference

__all__ = [
    "COPIES",
    "LARGEST_SCALES",
    "OUTLIER_COLUMNS",
    "STAGES",
    "Method",
    "code_of",
    "follow",
    "is_reference",
    "method",
    "methods",
    "permuter",
    "pruner",
    "quantizer",
    "rewriter",
    "transform",
    "transform_method",
    "ways_to",
]
