"""CUDA's execution model on a CPU: builds the kernels' sources with g++ and runs them without a GPU."""
