"""What makes the book: claims, figures, running the chapters, the command line. Knows chapters only as files."""
