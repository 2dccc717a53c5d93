"""The seven stages, in order: load -> calibrate -> (detect) -> transform -> quantize -> export -> evaluate.

`quantize.py` is the table of contents; `plan.py` decides beforehand; `journal.py` makes a run resumable.
"""
