"""Answers -> rates."""
