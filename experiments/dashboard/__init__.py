"""The store at a glance, for a page that only reads: runs, curves, sample stories, benchmarks, versions, verdicts.

MLflow takes seconds to import and holds the interpreter while it does, so the process that writes stories must
never load it. `reading` asks MLflow and is loaded by a process of its own (`python -m experiments.dashboard`);
`reader` starts that process on the first question, and answers from memory for some seconds after each.
"""
