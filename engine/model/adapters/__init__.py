"""Parameter-efficient fine-tuning: what is trained of a model that starts from a folder, and adapters beside it."""
