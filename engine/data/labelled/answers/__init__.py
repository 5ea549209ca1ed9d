"""Questions with answers in a text: files -> questions -> windows of tokens."""
