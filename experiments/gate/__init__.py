"""The gate: a version is promoted on evidence that was measured on that very artifact, or not at all."""
