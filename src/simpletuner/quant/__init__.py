"""Number formats of frozen weights: how they are stored and how a product with them is computed."""
