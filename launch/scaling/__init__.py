"""`zerobert scaling`: ladders of sizes trained, collected, fitted and reported."""
