"""What was lost: perplexity and divergence, benchmark tasks, sample text, two checkpoints compared, the gate."""
