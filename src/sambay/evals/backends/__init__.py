"""Who answers the calls: our engine, the classes of transformers, or a server."""
