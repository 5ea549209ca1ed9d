"""The certificate: first updates against the exact float64 step of whole parameters."""
