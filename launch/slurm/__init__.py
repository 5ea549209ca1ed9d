"""SLURM: submit, requeue, status, cancel."""
