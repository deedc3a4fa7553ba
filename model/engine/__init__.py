"""Continuous batching: requests, scheduler and streams over one runtime."""
