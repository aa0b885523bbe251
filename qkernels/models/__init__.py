"""What models look like: the table of architectures, building one without weights, and what counts as a linear layer."""
