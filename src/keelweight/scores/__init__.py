"""A number for every weight."""
