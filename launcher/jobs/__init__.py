"""A run as a job of a Ray cluster: handed in, looked at, followed, stopped."""
