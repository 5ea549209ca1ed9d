"""What knows DeepSpeed's insides."""
