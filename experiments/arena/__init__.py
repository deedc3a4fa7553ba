"""The arena: two contestants write from one prompt, a reader who does not know which is which chooses."""
