"""The suites: which runs each has, how one is trained, where its result is kept."""
