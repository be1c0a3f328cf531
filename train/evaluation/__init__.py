"""How good a learned word is, as Gal et al. 2022 score it: likeness and editability, judged by a CLIP model."""
