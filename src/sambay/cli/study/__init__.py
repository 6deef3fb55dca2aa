"""Whole studies, from data to a page with tables and pictures; each continues where it stopped."""

# As `sambay.cli.main.COMMANDS`.
SUBCOMMANDS = {
    "retrieval": "train small models alike and ask them for phone numbers, needles and chains",
}
