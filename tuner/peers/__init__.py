"""What a user would take instead of ditune: one file per peer, all measured alike."""
