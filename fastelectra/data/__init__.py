"""Text → documents → token shards → examples → packed, masked batches."""
