"""From samples to alerts: wire schema, store, laws, judge, advice, exporter, page. Needs no torch, ray or deepspeed."""
