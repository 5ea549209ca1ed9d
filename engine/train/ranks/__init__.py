"""The ranks of a run: their rendezvous, their process group, and how they share a machine."""
