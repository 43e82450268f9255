"""The contract as others hold it: the parser, the command, the guides."""
