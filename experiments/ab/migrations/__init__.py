"""How a database comes to hold the tables: one step a file, in order, each of them kept for good."""
