"""What the machine and other people's files may do to us: memory, caches, untrusted input."""
