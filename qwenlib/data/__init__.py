"""Text to training batches: corpora, filters, mixture, token shards, packing, sampling."""
