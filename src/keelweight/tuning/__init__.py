"""Mask and examples -> a tuned model or a patch."""
