"""Runs and registered versions side by side.

`choose` which ones · `frames` their curves, figures and differences as pandas frames · `figures` the curves as
pictures · `render` terminal, Markdown and files · `cli` the verb. Notebooks use the same functions.
"""
