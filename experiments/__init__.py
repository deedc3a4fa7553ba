"""How the model is judged: quality, decoding speed, comparisons; the log of what was tried."""
