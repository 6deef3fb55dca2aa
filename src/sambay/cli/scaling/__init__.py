"""Study how the loss falls with size: train ladders, fit laws, and carry hyperparameters over."""

# As `sambay.cli.main.COMMANDS`: modules of this package, with underscores for hyphens.
SUBCOMMANDS = {
    "ladder": "train several architectures in several sizes, resumable, into one table",
    "fit": "fit L = A D^-b + C to a table's losses and compare architectures",
    "coord-check": "measure how activations and updates change with width and depth",
    "transfer": "sweep the learning rate at several depths and show where the best one is",
    "table": "print sizes, tokens, rates and FLOPs of architectures at several depths",
}
