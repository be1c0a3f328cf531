"""Scores for learned words, as in Gal et al. 2022: likeness and editability, judged by a CLIP model."""
