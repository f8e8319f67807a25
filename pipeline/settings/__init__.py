"""The settings of a run, section by section, and the files that hold them."""
