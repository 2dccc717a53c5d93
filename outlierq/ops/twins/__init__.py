"""What a kernel computes, in plain torch: its definition, and the way without a GPU."""
