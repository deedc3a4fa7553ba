"""Rate limits on requests and tokens, for each client and for all together.

limiter = Limiter.from_settings(settings, redis)
reservation = await limiter.admit(limiter.clients.of(scope), requests)    # or LimitError, with `retry_after`
reservation.commit(stories=1, tokens=3)
reservation.release()
"""
