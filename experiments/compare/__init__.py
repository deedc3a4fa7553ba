"""Runs and registered versions side by side.

`frames` which ones, their curves, figures and differences as pandas frames · `render` pictures, terminal, Markdown and
files. Notebooks use the same functions.
"""
