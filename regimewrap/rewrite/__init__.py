"""The only code that changes a model: hooks, traced and rewritten methods, and the way back."""
