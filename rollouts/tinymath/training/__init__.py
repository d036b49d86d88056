"""How the embedded models were trained, data to weights."""
