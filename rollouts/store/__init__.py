"""Where rollouts are kept: a folder of append-only Parquet tables."""
