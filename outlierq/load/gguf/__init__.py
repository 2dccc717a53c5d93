"""GGUF files: headers, blocks, rotary scaling and tokenizers, presented as a `Checkpoint`."""
