"""The HTTP service: one ASGI application over any backend, the same alone, on Modal and beside the page.

    application = create_service(backend, ServiceOptions(name="blue"))

`python -m model.serving.http` runs it.
"""
