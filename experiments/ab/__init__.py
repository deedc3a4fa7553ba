"""A/B tests of model versions: assign users to variants, record what happens, and decide which variant is better."""
