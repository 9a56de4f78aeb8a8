"""Several layers as one step: projections of one input as a group, a gated MLP as one operator."""
