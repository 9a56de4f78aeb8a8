"""What other tools make of a model: names with wrappers in them, parameters in shards or offloaded."""
