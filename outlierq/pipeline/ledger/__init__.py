"""What makes a run safe: the work folder, the journal, and output that is read back."""
