"""`pdserve bench gpu` (make gpu-check): on a GPU, correctness first, then speed against floors of the same run."""
