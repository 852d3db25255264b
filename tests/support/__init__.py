"""What several test modules need: checkpoints, the oracle, a server, pictures."""
