"""Where values go: what an activation is for, and which dimension holds its channels."""
