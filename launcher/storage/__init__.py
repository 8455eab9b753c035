"""What a run leaves behind, and where: its log, its checkpoints, its output, its curve."""
