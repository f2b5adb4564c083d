"""What runs inside a user's pipeline: fingerprint, triggers, cache actions, hand-off, lookup."""
