"""Build and check the container image."""
