"""Triton device code and launchers (installed as `polydpo_fast.kernels`). No autograd, no public API."""
