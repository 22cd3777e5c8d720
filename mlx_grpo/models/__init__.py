"""Model code that mlx-lm does not have; a converter puts the file beside the weights."""
