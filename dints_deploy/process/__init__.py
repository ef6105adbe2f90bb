"""One case from file to files: read -> segment -> outputs -> self-check."""
