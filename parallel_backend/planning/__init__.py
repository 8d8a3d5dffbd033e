"""What a layout needs and takes on a machine, and which one to choose."""
