"""Front doors, callbacks and sinks for other frameworks: one file each, which imports the framework only when used."""
