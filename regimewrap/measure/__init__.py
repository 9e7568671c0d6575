"""What gates did and what the model can do at each budget, as numbers; changes nothing."""
