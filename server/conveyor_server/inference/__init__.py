"""The Open Inference Protocol (KServe v2) with Triton's sequence extension, over the sessions of everything else."""
