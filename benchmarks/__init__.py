"""One command each; every result names the machine it comes from."""
