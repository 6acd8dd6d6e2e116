"""What the experiments of the book's chapters need: data, networks, training and baselines."""
