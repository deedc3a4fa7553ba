"""Runs and registered versions side by side.

`choose` who is compared · `frames` their curves, figures and differences as pandas frames · `figures` the curves as
pictures · `shown` terminal, Markdown and files · `command` the verb. Notebooks use the same functions.
"""
