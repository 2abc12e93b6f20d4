"""Files of other evaluation tools. Imports no torch."""
