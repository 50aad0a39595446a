"""Sharing on the Hugging Face Hub; the one folder that knows huggingface_hub."""
