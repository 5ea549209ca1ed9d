"""The kernels on CPUs: C++ through ctypes."""
