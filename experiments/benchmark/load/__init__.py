"""Ways to send requests: as fast as they are answered (closed loop), or at times of their own (open loop)."""
