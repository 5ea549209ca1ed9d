"""Tasks on the tokens of a text."""
