"""run.yaml: its types, how it is read, and what can be said of it without looking at anything else."""
