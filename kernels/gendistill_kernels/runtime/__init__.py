"""What every family of kernels needs and none of them is: launches, memory, the lookup of configurations."""
