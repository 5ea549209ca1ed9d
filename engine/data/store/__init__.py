"""Documents -> token store: tokenized in parallel, memory-mapped, byte-identical for any number of workers."""
