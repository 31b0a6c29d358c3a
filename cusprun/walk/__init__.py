"""The layer walk: a model's forward pass over many documents, one decoder block in memory at a time."""
