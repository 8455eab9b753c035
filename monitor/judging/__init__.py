"""The judges at work inside a live monitor: one a run, in a process of their own."""
