"""RoBERTa and XLM-RoBERTa: BERT's encoder with one kind of segment, later positions and heads of their own."""
