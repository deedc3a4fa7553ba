"""PyTorch, for GPUs."""
