"""The nouns and the memory: records, errors, digests, the store, policy files, read-only lookup."""
