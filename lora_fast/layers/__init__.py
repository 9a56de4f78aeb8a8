"""Layers with adapters, one at a time: LoRA, DoRA, bottlenecks; how one is merged, saved merged, and guarded."""
