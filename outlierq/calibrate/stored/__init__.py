"""Statistics on disk: the folder that a user keeps, and what a run sets aside to save memory."""
