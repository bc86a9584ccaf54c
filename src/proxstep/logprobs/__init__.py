"""What a policy gives to tokens: log-probabilities, entropies, divergences; sums over masks."""
