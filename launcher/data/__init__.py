"""What a run reads: token files made from documents, and the order in which they are read."""
