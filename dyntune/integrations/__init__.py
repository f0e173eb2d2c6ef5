"""Front doors for other frameworks: one file each, which imports nothing of the framework but what it is handed."""
