"""The batch scripts on a Slurm of one machine that the tests start themselves."""
