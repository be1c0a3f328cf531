"""Export: a model in diffusers format becomes a bundle here, checked against PyTorch."""
