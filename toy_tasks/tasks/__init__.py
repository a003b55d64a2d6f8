"""One file per paper; `loracle toy list` finds them by name."""
