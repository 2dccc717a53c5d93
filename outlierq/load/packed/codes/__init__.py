"""Codes as they lie in files: words, bytes, halves of bytes, and the numbers that they stand for."""
