"""One rank: engine, loop, and how it saves while it trains. Knows nothing of Ray."""
