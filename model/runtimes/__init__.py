"""Compute logits: the runtime protocol, sampling, and one package for each runtime."""
