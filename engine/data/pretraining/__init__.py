"""The samples of an epoch: sentence pairs and masks, pure functions of a seed and a place."""
