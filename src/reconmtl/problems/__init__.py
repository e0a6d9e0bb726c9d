"""Ready problems, one file each."""
