"""How many stories and tokens a client, and all together, may have in a time.

    limiter = Limiter.of(settings, link)
    ticket = await limiter.admit(limiter.clients.of(scope), requests)    # or LimitError, with `retry_after`
    ticket.begun(); ticket.wrote(3); ticket.close()

`quotas` reads what is allowed, `clients` finds out who asks, `windows` and `shared` count (here, and in the Redis
that replicas share), and `limiter` puts it together.
"""
