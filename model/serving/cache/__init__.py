"""Stories that are told again instead of being written again.

    backend = RememberingBackend(backend, Memory(...))

A backend over a backend, so page and service need not know: `story` is what is kept and its key, `stores` where,
`flight` a story that several readers follow while it is written, and `backend` puts it together.
"""
