"""Bytes of files: safetensors read without trust, delta files, checkpoint folders. docs/FORMAT.md is the text."""
