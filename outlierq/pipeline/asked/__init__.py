"""What a job is asked for, before anything is read."""
