"""A diffusers model becomes a bundle: graphs traced, checked against PyTorch, and written with their manifest."""
