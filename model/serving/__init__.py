"""Serve stories: backends, HTTP service, cache, rate limits and deployments."""
