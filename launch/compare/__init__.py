"""Whether two finished runs, or two folders of seeds, differ by more than chance."""
