"""The monitor as a service: HTTP, tokens, metrics, people's words."""
