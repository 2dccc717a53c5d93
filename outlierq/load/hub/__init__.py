"""The Hub: files of one commit, fetched whole or streamed, and held against the digests that the Hub lists."""
