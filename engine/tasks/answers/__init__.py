"""Answers in a text: the task, its spans, SQuAD's scores, its report."""
