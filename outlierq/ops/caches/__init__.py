"""How papers keep keys and values in a few bits.

What a checkpoint or a server's flag says is elsewhere: no program runs these, so `eval --kv-cache` judges them.
"""
