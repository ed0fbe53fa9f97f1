"""CPU kernels of this repository, compiled on first use; every caller has a plain torch path beside them."""
