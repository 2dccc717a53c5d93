"""`outlierq tune`: what is continuous in a finished checkpoint, tuned against its original; see `quantize/tune.py`."""
