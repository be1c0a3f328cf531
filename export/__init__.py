"""Exports a diffusers model to a bundle: traces its graphs, checks them against PyTorch, adds a manifest."""
