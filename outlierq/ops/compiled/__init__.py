"""What outlierq/native holds in C, called from Python, where there was a compiler."""
