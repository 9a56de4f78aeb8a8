"""A whole model: which layers get adapters, putting them in and out, their tensors as a state dict."""
