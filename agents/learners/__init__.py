"""Who learns: from trees to routers."""
