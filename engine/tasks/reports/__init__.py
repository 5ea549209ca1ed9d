"""Final reports of fine-tuning tasks."""
