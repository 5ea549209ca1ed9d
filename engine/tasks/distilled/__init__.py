"""Training losses that a teacher's predictions, hidden states and attention give, beside the task's own."""
