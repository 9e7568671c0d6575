"""Which units are kept: a slow, obvious reference, the fast kernels, and the torch operator with its gradient.

This room sees tensors and numbers. It must not know models, policies or sites.
"""
