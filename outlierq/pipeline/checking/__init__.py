"""What `verify` looks at, one question a file: each gives its findings, and none stops another."""
