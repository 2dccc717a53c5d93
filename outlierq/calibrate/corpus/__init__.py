"""What a model is calibrated on: text, chats, files of either, images."""
