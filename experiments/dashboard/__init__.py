"""The MLflow store at a glance, for a page that only reads: runs, curves, samples, benchmarks, versions, verdicts.

MLflow takes seconds to import and holds the interpreter lock meanwhile, so the serving process must never load it.
`python -m experiments.dashboard` is a process of its own that reads the store (`rows`); `client` starts it on the first
question and caches its answers for some seconds.
"""
