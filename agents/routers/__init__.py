"""Who decides: routers, and the artefacts that they are kept in. NumPy only."""
