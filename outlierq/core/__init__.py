"""The values that stages exchange, and the error tree. Imports nothing of ours."""
