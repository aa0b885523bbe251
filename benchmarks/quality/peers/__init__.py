"""Quality side by side: the same model, tokens, bits and group size through other tools' quantizers and ours; see `__main__`."""
