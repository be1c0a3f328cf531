"""Runtime: a bundle, concepts and requests become pictures here. No torch."""
