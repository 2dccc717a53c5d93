"""What a model is calibrated on: text, chats, files of either, images."""

from outlierq.calibrate.text.windows import TextSource, TokenSet, token_windows

__all__ = ["TextSource", "TokenSet", "token_windows"]
