"""One job, from its spec to its last checkpoint."""
