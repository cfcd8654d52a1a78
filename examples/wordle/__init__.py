"""Asynchronous RL on a toy: a tiny Qwen3 learns Wordle, and its weights reach vLLM only as deltas through a bucket."""
