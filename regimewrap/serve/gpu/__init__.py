"""Products that skip zeros on a GPU, for one to four rows."""
