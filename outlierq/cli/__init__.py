"""The door: words in, words out. One small file a command."""
