"""Sampling: prefill, decoding with a KV cache shared by a group, CUDA graphs and the choice of tokens."""
