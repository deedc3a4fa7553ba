"""Blue/green deployment state."""
