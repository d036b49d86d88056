"""How a file is kept so that damage is told instead of read."""
