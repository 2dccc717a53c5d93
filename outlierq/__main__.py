"""`python -m outlierq` is the same as `outlierq`."""

from outlierq.cli.main import run

run()
