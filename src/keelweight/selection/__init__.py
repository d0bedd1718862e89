"""Scores -> mask."""
