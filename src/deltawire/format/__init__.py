"""Bytes of files as docs/FORMAT.md specifies them: safetensors, delta files, checkpoint folders."""
