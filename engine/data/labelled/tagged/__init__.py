"""Texts whose words carry tags: files -> texts, words and tags -> windows of tokens."""
