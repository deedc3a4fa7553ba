"""Quality of a model: how well it predicts stories it has not seen, and what the stories that it writes are like."""
