"""What is applied: vectors, terms, and the words that name them. Nothing here knows a model's weights, a file or a server."""
