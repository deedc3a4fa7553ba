"""Blue/green releases: upload, start, check and switch between two deployments.

`cli` has the verbs of `story deploy`, `release` what they do, `platforms` the places where deployments
run, `container` what a GPU container runs.
"""
