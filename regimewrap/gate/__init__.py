"""The one gate that all sites of a model share, and what is in force at it."""
