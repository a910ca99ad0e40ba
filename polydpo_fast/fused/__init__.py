"""What stands between `polydpo_fast.loss` and the kernels.

`arguments` and `head_arguments` check what was given, before anything is computed. `operators` is PyTorch's view of the
two launches, `autograd` joins them to a graph, and `fast_lane` repeats a call that was checked before. `cpu` launches
C++, to which `programs` gives the objectives as lists of instructions.
"""
