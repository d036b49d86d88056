"""Many machines: one driver that keeps the store, and workers on Ray that own engines."""
