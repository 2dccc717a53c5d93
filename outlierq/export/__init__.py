"""Stage 6: one file per on-disk format, the layout, the writer, and read-back verification."""

from outlierq.export.format import Format, format_type

__all__ = ["Format", "format_type"]
