"""A/B routing of users between model variants."""
