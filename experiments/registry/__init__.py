"""Registered versions of the model."""
