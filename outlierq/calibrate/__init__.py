"""Stage 2, calibrate: text to tokens, one block at a time, and what its linear inputs looked like.

text: sources to token windows. runner: blocks one by one. trace, groups, folds: which sites share an input, and what
can absorb a scale on it. collect: `InputStats` from hooks. observe, attention, extremes: `BlockStats`. logits: a sample
of what the model says. stored: the statistics folder.
"""
