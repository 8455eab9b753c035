"""What the monitor keeps: one writer, many readers, nothing lost and nothing silently wrong."""
