"""Load from outside: everything here talks to a server over the wire."""
