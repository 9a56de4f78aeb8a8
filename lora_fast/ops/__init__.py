"""The fused kernels as differentiable operators, in eager and under torch.compile. All of it needs Triton."""
