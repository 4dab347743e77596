"""Attention and projections on GPUs, by Triton kernels; `backend` is the attention backend `triton`."""
