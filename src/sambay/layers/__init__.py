"""The modules of a block: mixers, MLP, norms, and the values they exchange."""
