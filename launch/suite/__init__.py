"""Tasks x settings x seeds from one YAML file: all runs, and one table of what they score."""
