"""Where activations happen, and which of them a policy gates. Reads models; never runs or changes them."""
