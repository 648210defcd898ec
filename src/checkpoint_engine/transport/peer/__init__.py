"""Reading other processes' host memory: one interface, several implementations, and the server that offers regions."""
