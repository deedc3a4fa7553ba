"""How fast a model serves stories, measured so that a version can be promoted or refused by it.

Readers want the first word soon and no pause after it; an operator wants many readers served at once. So the
same requests go to a target alone, many at once, and at random times, and every request leaves one row.

`plan` what is asked · `targets` who is asked · `load` how requests are sent · `sample` what one leaves ·
`measures` the definitions of all figures · `memory` · `compare` two targets in turn · `report`, `shown`,
`figures` what people see · `evidence` what MLflow keeps for the gate · `run` puts these together.
"""
