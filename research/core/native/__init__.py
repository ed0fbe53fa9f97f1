"""CPU kernels of this repository, in C++ without a framework, compiled on first use; every caller has plain operators beside them."""
