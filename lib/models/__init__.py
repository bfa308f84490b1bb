"""Models: one readable Transformer, and one softmax layer whose weights are written by hand."""
