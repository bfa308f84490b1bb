"""Tasks: one file each, with an exact definition, every input, samples, and a worked example."""
