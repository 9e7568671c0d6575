"""Source code in, activation calls out; runs nothing and changes nothing."""
