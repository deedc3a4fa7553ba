"""Two deployments side by side: uploaded, started, warmed, checked, switched between.

`cli` has the verbs of `story deploy`, `release` what they do, `platform` what is asked of a place where
deployments run, `loopback` and `on_modal` two such places, `smoke` the check, `container` what a GPU container runs.
"""
