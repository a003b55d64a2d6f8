"""The experiments: one per paper, each of which a laptop runs in under a minute."""
