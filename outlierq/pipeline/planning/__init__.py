"""What is decided before work starts, from headers alone: plan, size, memory, time."""
