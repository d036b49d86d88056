"""The service in front of the embedded models, with its playground: one command, nothing to install or to download."""
