"""The MLflow store at a glance, for a page that only reads: runs, curves, samples, benchmarks, versions, verdicts.

MLflow takes seconds to import and holds the interpreter lock meanwhile, so the serving process must never load it:
`client` has a worker process read the store (`rows`), and caches its answers for some seconds.
"""
