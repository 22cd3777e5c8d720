"""One optimizer step: its micro-batches, its log-probs, the layers that it trains."""
