"""How fast a model serves stories: the same requests one at a time, many at once, and at random times.

`plan` what is asked · `targets` who is asked · `load` how requests are sent · `measures` the row of a request and the
definitions of all figures · `memory` · `compare` two targets · `report`, `render`, `figures` the output · `evidence`
what MLflow keeps for the gate · `run` puts these together · `cold_start` the process that measures one.
"""
