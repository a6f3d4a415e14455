"""The command line: one thin file a verb; parse, call the library, print. Imports every room."""
