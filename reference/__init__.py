"""The mathematics of low-rank adaptation: one readable file per paper, and nothing else."""
