"""Callbacks for trainers that are not ours. They tell losscast of every step; see `launcher.integrations.line`."""
