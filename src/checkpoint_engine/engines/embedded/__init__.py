"""A small engine of our own: a real HTTP server around a transformers model, which updates as the large engines do."""
