"""What ISOPO costs beside plain REINFORCE, the paper's pseudo-code and per-sample gradients."""
