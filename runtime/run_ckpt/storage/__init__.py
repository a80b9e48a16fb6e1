"""Files on a disk, for the converter and the loader."""
