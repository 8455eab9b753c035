"""Azure: identity, blob store, and the infrastructure that makes the cluster. The only package that imports azure."""
