"""How fast a model serves stories: the same requests one at a time, many at once, and at random times.

`load` what is asked, and how requests are sent · `targets` who is asked · `measures` the row of a request and the
definitions of all figures · `memory` · `report` all figures of a run · `evidence` the output, and what MLflow keeps for
the gate · `run` puts these together · `cold_start` the process that measures one.
"""
