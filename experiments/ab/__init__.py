"""Two versions tried on readers: who reads which, what came of it, and whether that decides."""
