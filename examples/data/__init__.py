"""Text and images for the examples: where they come from, their form, and how batches are drawn."""
