"""Training: whole sequences under the bounded cache, segment by segment; see `replay.py`."""
