"""The bridge to MindFormers: its YAML files and the flags of its scripts, read and written."""
