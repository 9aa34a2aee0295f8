"""Tools for studying a model: recorded activations, the anatomy of a forward pass, and the pages that show them."""
