"""The decoder, its attention, and the table that ties each family to its Hugging Face weights."""
