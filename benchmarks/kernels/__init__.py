"""Single layers: every kernel of ours beside every peer, on the shapes of real models, under the roofs of the same run."""
