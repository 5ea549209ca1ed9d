"""What a model is trained to do; the loop knows only the protocol in `task`."""
