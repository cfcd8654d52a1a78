"""The demo: trainer, bucket, vLLM and environment on one screen; the folders of three Spaces."""
