"""Inference at one budget: fixed thresholds in place of the selection."""
