"""The data sets of the book, and where they come from."""
