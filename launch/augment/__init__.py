"""`zerobert augment`: new labelled examples of a file's rows, and labels of rows that have none."""
