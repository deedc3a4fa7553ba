"""Search for a better recipe: many short training runs, each stopped early where it falls behind."""
