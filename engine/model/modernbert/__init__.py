"""ModernBERT: rotary positions, norms before the sub-layers, gated feed-forward networks, windows of attention."""
