"""Curvature in the training loops of others: `lightning` and `huggingface`, to be imported."""
