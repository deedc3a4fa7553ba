"""The HTTP service: one ASGI application over any backend, the same alone, on Modal and beside the page.

    application = create_service(backend, ServiceOptions(name="blue"))

`app` puts it together; `python -m model.serving.http` runs it. What goes over the wire is described where it is
made: bodies in `bodies`, completions in `completions`, the simple form in `simple`, Socket.IO in `sockets`,
failures in `errors`.
"""
