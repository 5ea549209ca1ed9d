"""`zerobert compress`: the road from a trained model to a small and fast graph."""
