"""The selection on GPUs, compiled by Triton."""
