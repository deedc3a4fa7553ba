"""One-off measurements, kept so that their figures can be reproduced."""
