"""What a run would be, before it is: from its spec alone, measured where asked."""
