"""What a job is asked for, what it may use, and who listens."""
