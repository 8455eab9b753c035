"""A run as a RayJob on Kubernetes."""
