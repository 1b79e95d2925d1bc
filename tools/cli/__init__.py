"""The command line `auricle`."""
