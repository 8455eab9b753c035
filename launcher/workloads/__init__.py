"""What is trained. A workload is a torch module whose forward returns the mean loss of a batch in nats per token."""
