"""Commands that choose or compare before anything is written."""
