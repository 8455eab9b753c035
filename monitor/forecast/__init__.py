"""From finished runs to a law, and from a law to a prediction with an interval."""
