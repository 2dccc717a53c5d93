"""GGUF files for llama.cpp: the format, the header, and tokenizers of SentencePiece pieces."""
