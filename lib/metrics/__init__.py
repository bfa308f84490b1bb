"""Pure functions from tensors or numbers to numbers: bounds, shattering, communication, the frontier."""
