"""Several adapters over one layer, each for its own rows of a batch."""
