"""Several processes that prune one model together."""
