"""Models, data and runs that a person would copy; not part of the installed package."""
