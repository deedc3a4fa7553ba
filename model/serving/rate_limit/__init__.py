"""How many stories and tokens a client, and all together, may have in a time.

    limiter = Limiter.from_settings(settings, link)
    reservation = await limiter.admit(limiter.clients.of(scope), requests)    # or LimitError, with `retry_after`
    reservation.commit(stories=1); reservation.commit(tokens=3); reservation.release()

`quotas` reads what is allowed, `clients` finds out who asks, `windows` and `shared` count (here, and in the Redis
that replicas share), and `limiter` puts it together.
"""
