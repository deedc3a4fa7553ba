"""Look inside the network: what its recurrences remember of a story, and what its attention attends to.

`trace` one story through the network, with each layer's weights between tokens, and what stories and names cost when a
kind of layer sees fewer tokens · `figures` pictures.
"""
