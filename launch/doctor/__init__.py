"""What `zerobert doctor` looks at: small functions that return findings, one subject a module."""
