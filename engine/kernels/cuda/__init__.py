"""The kernels on GPUs: CUDA through NVRTC."""
