"""The miniature: the drawn world, and the training of the small model that ships with oneword."""
