"""Searches policies under a quality constraint, proves the winner on unseen prompts, saves it."""
