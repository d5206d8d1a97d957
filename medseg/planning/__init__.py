"""Planning: fingerprint and budget to plan; pure functions."""
