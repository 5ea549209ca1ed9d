"""Training losses of fine-tuning tasks that a regulariser makes of the task's own."""
