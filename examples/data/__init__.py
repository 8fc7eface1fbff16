"""Text for the examples: where it comes from, its vocabulary, and masked blocks of it."""
