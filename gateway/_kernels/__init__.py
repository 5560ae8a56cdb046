"""The compiled kernels (sources in ``kernels/``): ring, pack, decode."""
