"""Is this machine, or every node of a job, ready to train: each check on its own, nothing of it imported before."""
