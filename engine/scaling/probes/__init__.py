"""Abilities of an encoder, each by a count of right answers and by numbers that change smoothly."""
