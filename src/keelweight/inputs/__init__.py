"""Models, prompts, answers; which weights count."""
