"""Where PTE meets the Hugging Face model; see `attach.py`."""
