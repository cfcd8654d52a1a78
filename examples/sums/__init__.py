"""Asynchronous RL on a pretrained model: SmolLM2-135M-Instruct learns small sums, and vLLM follows through a bucket."""
