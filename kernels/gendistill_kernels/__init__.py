"""Triton kernels of gendistill. Imports only torch and triton."""
